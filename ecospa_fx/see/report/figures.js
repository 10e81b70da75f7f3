"use strict";
// Figures of plotly.js in the colours of the page: drawn into the elements figure0, figure1 and so on.
function paintFigures(figures) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  figures.forEach((figure, i) => {
    const layout = { margin: { t: 20, r: 60, b: 45, l: 60 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 } };
    for (const [name, value] of Object.entries(figure.layout)) layout[name] = name.includes("axis") ? { gridcolor: line, zerolinecolor: line, ...value } : value;
    Plotly.react("figure" + i, figure.traces, layout, { responsive: true, displaylogo: false });
  });
}

// Light or dark as the reader's system says, until the button is pressed.
function themed(repaint) {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  const paint = (theme) => { root.dataset.theme = theme; repaint(); };
  paint(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => paint(dark.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => paint(root.dataset.theme === "dark" ? "light" : "dark"));
}
