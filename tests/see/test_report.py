"""The HTML report in a real browser: it loads without errors, and answers to clicks, keys and the filter."""

import json
import shutil

import pytest
import torch
from test_explain import Model, X
from zoo import ZOO

import ecospa_fx
from ecospa_fx.see.report import training_of
from ecospa_fx.see.report.training import figures_of, widths_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (apt install chromium)")
PATIENCE = 60_000  # milliseconds: a shared machine may be slow; nothing is timed


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    pages = []

    def open_page(path, **options):
        page = browser.new_page(viewport={"width": 1280, "height": 800}, **options)
        page.set_default_timeout(PATIENCE)
        trouble, asked = [], []
        page.on(
            "console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        pages.append((page, trouble, asked))
        return page

    yield open_page
    for page, trouble, asked in pages:
        assert trouble == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
        page.close()


@pytest.fixture(scope="module")
def trained():
    """A model after a short run, and what a report knows of the run."""
    torch.manual_seed(0)
    model = ecospa_fx.compile(Model(), example_inputs=(X,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.6, interval=2, start=2, end=10)
    losses = []
    for _ in range(12):
        loss = model(X).pow(2).mean()
        loss.backward()
        optimizer.step()
        trainer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, training_of(trainer, losses, valid=[(6, 0.5), (12, 0.4)])


@pytest.fixture(scope="module")
def explanation():
    return ecospa_fx.explain(Model(), example_inputs=(X,))


def text_of(page, selector):
    return page.locator(selector).inner_text()


@in_browser
def test_click_a_linear_see_its_couplings_then_the_proof(explanation, open_page, tmp_path):
    explanation.report(tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    assert text_of(page, "h1") == "Model: 15 couplings in 3 regions"
    page.click('[data-path="layers.0"]')
    page.click('[data-path="layers.0.q"]')
    details = text_of(page, "#details")
    assert "weight: 16 × 8" in details and "layers.0.groups" in details and "dim 1 has no partner" in details
    page.locator("#details .card", has_text="layers.0.qk").locator("button").click()
    proof = text_of(page, "#details")
    assert "layers.0.q.weight[0] → layers.0.k.weight[0]" in proof
    assert "aten.scaled_dot_product_attention takes it to" in proof
    assert "test_explain.py:" in proof and "scaled_dot_product_attention(q, k, v" in proof  # the line of code itself
    page.locator("#details button.member", has_text="layers.0.k.weight").click()
    assert "layers.0.k Linear" in text_of(page, "#details h2")
    page.click('[data-path="layers.0.gate"]')
    assert "dim 1 stays whole: it leaves the region as output 0" in text_of(page, "#details")


@in_browser
def test_filter_tables_and_refusals(explanation, open_page, tmp_path):
    explanation.report(tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    page.fill("#filter", "layers.2.up")
    shown = page.locator("#tree .row").evaluate_all("rows => rows.map(row => row.dataset.path)")
    assert shown == ["", "layers", "layers.2", "layers.2.up"]
    page.fill("#filter", "no such thing")
    assert text_of(page, "#tree") == "No module fits the filter."
    page.fill("#filter", "glu")
    page.click("#tab-couplings")
    assert page.locator("#couplings tbody tr").count() == 3 and page.locator("#model").is_hidden()
    page.fill("#filter", "")
    assert page.locator("#couplings tbody tr").count() == 15
    saved = explanation.savings()["layers.0.heads"]
    assert str(saved.most_parameters) in text_of(page, "#couplings tbody tr >> nth=0")
    page.locator("#couplings tbody button").first.click()
    assert "layers.0.heads" in text_of(page, "#details h2") and page.locator("#model").is_visible()
    page.click("#tab-refusals")
    assert "it leaves the region as output 0" in text_of(page, "#refusals")
    assert "size 8, 3 times" in text_of(page, "#refusals")


@in_browser
def test_the_keyboard_alone_will_do(explanation, open_page, tmp_path):
    explanation.report(tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    chosen = "() => document.activeElement.dataset.path"
    page.focus('#tree [aria-selected="true"]')
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert page.evaluate(chosen) == "layers.0.q"
    assert "layers.0.q Linear" in text_of(page, "#details h2")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert page.evaluate(chosen) == "layers.0" and page.locator('[data-path="layers.0.q"]').count() == 0
    page.keyboard.press("End")
    assert page.evaluate(chosen) == "layers.2"
    page.keyboard.press("/")
    page.keyboard.type("down")
    assert page.locator("#tree .row").count() == 8
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    assert (
        page.locator("#couplings").is_visible() and page.evaluate("() => document.activeElement.id") == "tab-couplings"
    )
    page.keyboard.press("ArrowRight")
    assert page.locator("#refusals").is_visible()


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(explanation, open_page, tmp_path, scheme):
    explanation.report(tmp_path / "report.html")
    page = open_page(tmp_path / "report.html", color_scheme=scheme)
    ground = "() => getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 31)"}
    assert page.evaluate(ground) == colours[scheme]
    page.click("#theme")
    assert page.evaluate(ground) == colours["dark" if scheme == "light" else "light"]


@in_browser
def test_training_shows_loss_widths_and_importance(trained, open_page, tmp_path):
    model, training = trained
    ecospa_fx.explain(model).report(tmp_path / "report.html", training=training)
    page = open_page(tmp_path / "report.html")
    page.click("#tab-training")
    page.wait_for_selector("#figure2 .heatmaplayer image")
    assert page.locator("#figure0 .scatterlayer .trace").count() == 3
    titles = page.locator("#training h3").all_inner_texts()
    assert titles[0] == "Loss and size" and titles[1].startswith("Width") and titles[2].startswith("Importance")
    page.click("#theme")
    assert page.locator("#figure0 .scatterlayer .trace").count() == 3


@in_browser
def test_a_model_of_70b_stays_responsive(open_page, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        tokens = torch.zeros(2, 8, dtype=torch.long)
    explanation = ecospa_fx.explain(model, example_inputs=(tokens,))
    assert len(explanation.couplings) == 400
    explanation.report(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    page = open_page(tmp_path / "report.html")
    assert page.locator("#tree .row").count() < 120  # blocks lie closed: rows are made when they are opened
    page.click('[data-path="model.layers.79"]')
    page.click('[data-path="model.layers.79.self_attn"]')
    page.click('[data-path="model.layers.79.self_attn.q_proj"]')
    assert "model.layers.79.self_attn.qk" in text_of(page, "#details")
    page.fill("#filter", "layers.4")
    page.fill("#filter", "layers.41.mlp")
    assert page.locator("#tree .row").count() == 9
    page.fill("#filter", "")
    page.click("#tab-couplings")
    assert page.locator("#couplings tbody tr").count() == 400
    assert page.evaluate("() => document.querySelectorAll('*').length") < 8000


def test_names_cannot_break_out_of_the_page(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("</script><b>", torch.nn.Linear(4, 6))
            self.down = torch.nn.Linear(6, 4)

        def forward(self, x):
            return self.down(getattr(self, "</script><b>")(x).relu())

    Odd.__name__ = "<Odd & even>"
    ecospa_fx.explain(Odd(), example_inputs=(torch.randn(2, 4),)).report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "</script><b>" not in text and "<Odd" not in text
    document = text.split('id="document">')[1].split("</script>")[0]
    assert json.loads(document)["model"] == "<Odd & even>"


def test_widths_over_time_are_those_of_the_model(trained):
    model, training = trained
    steps, widths = widths_of(json.loads(json.dumps(training)))
    assert steps == [0, *(entry["step"] for entry in training["history"])]
    for coupling in ecospa_fx.couplings(model):
        assert widths[coupling.name][0] == coupling.original_size
        assert widths[coupling.name][-1] == coupling.size
    assert [figure["title"].split()[0] for figure in figures_of(training)] == ["Loss", "Width", "Importance", "Share"]
    assert training["sizes"][-1] == sum(p.numel() for p in model.parameters())


def test_a_model_without_couplings_has_a_report_too(tmp_path):
    specimen = ZOO["unknown_op"]
    explanation = ecospa_fx.explain(specimen.build(), example_inputs=specimen.inputs(2, 5))
    explanation.report(tmp_path / "report.html")
    assert "specimens.centred" in (tmp_path / "report.html").read_text()


def aria(page, selector):
    return page.locator(selector).evaluate_all("nodes => nodes.map(node => node.getAttribute('aria-label'))")


@in_browser
def test_the_graph_unfolds_block_by_block(explanation, open_page, tmp_path):
    explanation.report(tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    page.click("#tab-graph")
    (fold,) = page.locator(".fold").all()  # three equal blocks are one, and one alone lies open
    assert "layers.* ×3" in fold.inner_text() and fold.get_attribute("aria-expanded") == "true"
    weights = {label.split(" ")[0] for label in aria(page, "#graph .weight")}
    assert weights == {"q", "k", "v", "o", "gate", "up", "down", "norm"}
    pills = aria(page, "#graph .coupling")
    assert sorted(pill.split(" ")[0] for pill in pills) == ["glu", "groups", "heads", "qk", "vo"]
    assert all("×3" in pill for pill in pills)
    dims = sum(len({(m.parameter, m.dim) for m in c.members}) for c in explanation.couplings if ".0." in c.name)
    whole = [name for r in explanation.refusals if "layers.0." in r.members[0] for name in r.members]
    assert "layers.0.norm.bias[0]" in whole  # it goes with its weight, without a place of its own
    assert page.locator("#graph .edge").count() == dims + len(whole) - 1
    page.select_option("#graph select", "layers.2")
    assert not [pill for pill in aria(page, "#graph .coupling") if "×" in pill or "layers.2" not in pill]
    fold.click()
    assert page.locator("#graph .drawing").count() == 0
    page.keyboard.press("Enter")  # the button keeps the focus
    page.locator("#graph .coupling", has_text="glu").press("Enter")
    assert "layers.2.glu" in text_of(page, "#details h2") and "takes it to" in text_of(page, "#details")
    page.click("#tab-graph")
    page.locator("#graph .weight", has_text="down").click()
    assert "layers.2.down Linear" in text_of(page, "#details h2")


@in_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_graph_fits_the_page(explanation, open_page, tmp_path, width):
    explanation.report(tmp_path / "report.html")
    page = open_page(tmp_path / "report.html")
    page.set_viewport_size({"width": width, "height": 800})
    page.click("#tab-graph")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    outside = """() => [...document.querySelectorAll('#graph .drawing, #graph rect')].filter(
        node => node.scrollWidth > node.clientWidth + 1 || node.getBoundingClientRect().right > innerWidth).length"""
    assert page.evaluate(outside) == 0


@in_browser
def test_runs_side_by_side(trained, open_page, tmp_path):
    _, training = trained
    other = {**training, "loss": [2 * loss for loss in training["loss"]], "settings": {"target": 0.5, "seed": 1}}
    one = {**training, "settings": {"target": 0.6, "seed": 1}}
    compared = ecospa_fx.report.compare_runs({"one": one, "<other>": other})
    assert compared.differ == {"target": (0.6, 0.5)} and compared.rows["held-out loss"] == (0.4, 0.4)
    first, second = compared.rows["loss, mean of the last 10"]
    assert second == pytest.approx(2 * first) and first == pytest.approx(sum(training["loss"][-10:]) / 10)
    compared.report(tmp_path / "compared.html")
    page = open_page(tmp_path / "compared.html")
    page.wait_for_selector("#figure3 .heatmaplayer image")
    assert page.locator("#figure0 .scatterlayer .trace").count() == 2
    cells = page.locator("#facts-table tr", has_text="target").locator("td").all_inner_texts()
    assert cells == ["0.6", "0.5"] and "<other>" in text_of(page, "#facts-table")
    page.click("#theme")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390


def test_runs_that_cannot_be_compared_are_refused(trained):
    _, training = trained
    with pytest.raises(ecospa_fx.errors.ArgumentError, match="`runs` has 1 of the two or more runs"):
        ecospa_fx.report.compare_runs({"one": training})
    with pytest.raises(ecospa_fx.errors.ArgumentError, match=r"`runs\['two'\]` has no 'loss'; it must be what"):
        ecospa_fx.report.compare_runs({"one": training, "two": {}})


class Slow(torch.nn.Module):
    """A clock by which each call of a model takes as long as it says."""

    now = 0.0

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.modes = seconds, []

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        Slow.now += self.seconds.pop(0) if isinstance(self.seconds, list) else self.seconds


def test_latency_is_of_both_in_turn(monkeypatch, tmp_path):
    monkeypatch.setattr("time.perf_counter", lambda: Slow.now)
    # Other load, which slows a round down three times, meets both.
    load = [9.0, 9.0, 9.0, 1.0, 3.0, 1.0, 1.0]
    before, after = Slow([2.0 * each for each in load]), Slow(list(load))
    latency = ecospa_fx.report.latency_of(before, after, (X,), rounds=4)
    assert (latency["ratio"], latency["low"], latency["high"]) == (0.5, 0.5, 0.5)
    assert (latency["before"], latency["after"], latency["rounds"]) == (2.0, 1.0, 4)
    assert set(before.modes) == {(False, False)} and before.training and after.training
    ecospa_fx.explain(Model(), example_inputs=(X,)).report(tmp_path / "report.html", latency=latency)
    words = "a forward takes 1e+03 ms, before 2e+03 ms (x 0.50, middle half 0.50 to 0.50, on cpu, 1 thread)"
    assert words in (tmp_path / "report.html").read_text()
    with pytest.raises(ecospa_fx.errors.ArgumentError, match="`latency` has no 'after'; it must be what"):
        ecospa_fx.explain(Model(), example_inputs=(X,)).report(tmp_path / "report.html", latency={"before": 1})
    with pytest.raises(ecospa_fx.errors.ArgumentError, match="`rounds` is 1; it must be a whole number, at least 2"):
        ecospa_fx.report.latency_of(before, after, (X,), rounds=1)
