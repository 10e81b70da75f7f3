"use strict";
// The page of a comparison: its table is there, its figures lie in the element `document`.
(() => {
  const { figures } = JSON.parse(document.getElementById("document").textContent);
  const place = document.getElementById("figures");
  figures.forEach((figure, i) => {
    const title = document.createElement("h3"), drawing = document.createElement("div"), both = document.createElement("div");
    title.textContent = figure.title;
    drawing.id = "figure" + i;
    both.append(title, drawing);
    place.append(both);
  });
  themed(() => paintFigures(figures));
})();
