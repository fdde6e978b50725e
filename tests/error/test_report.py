"""nf4 error: what it prints and writes, and the page in a browser."""

import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

import nf4
from nf4.commands.cli import main
from nf4.error.report.measure import ErrorReport, as_json, measure, perplexities
from nf4.error.report.run import run_error, scored_schemes
from nf4.error.schemes import Scheme
from nf4.tools.progress import progress_bar

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a random Llama with outliers in a layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.view(-1)[::97] *= 25
    path = tmp_path_factory.mktemp("model") / "tiny <llama> & co"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """Run the whole report once, perplexities of a stand-in model included."""
    out = tmp_path_factory.mktemp("report") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nf4.error.report.run.load_model", lambda source: stand_in(folder))
        text = out.parent / "text.txt"
        text.write_text("word " * 3000)
        options = ["--perplexity", str(text), "--tokens", "512", "--out", str(out)]
        assert main(["error", str(folder), "--csv", *options]) == 0
    return out


def stand_in(folder):
    """Return the model, and what turns a word into the token of its place."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder).eval()

    def tokenizer(text, **options):
        return SimpleNamespace(input_ids=[i * i % 320 for i, _ in enumerate(text.split())])

    return model, tokenizer


def test_layers_and_totals_are_those_of_model_error(folder) -> None:
    report = measure(folder, ("lm_head",), Scheme(double_quant=True), progress_bar, compare=False)
    assert report.layers == nf4.model_error(folder)
    w_hat = w = 0.0
    model = stand_in(folder)[0]
    for row in report.layers:
        weight = model.get_submodule(row.name).weight.detach()
        back = nf4.dequantize(nf4.quantize(weight))
        w_hat += (back - weight).double().square().sum().item()
        w += weight.double().square().sum().item()
    assert report.relative == pytest.approx((w_hat / w) ** 0.5, rel=1e-5)
    assert report.parameters == sum(r.error.numel for r in report.layers)
    assert report.worst()[0].name == "model.layers.1.mlp.up_proj"
    assert len(report.worst()) == 10 and report.schemes == []
    assert sum(report.histogram) == pytest.approx(1)
    assert report.histogram[0] + report.histogram[-1] > 1 / 64  # the largest of each block


def test_schemes_are_compared_on_all_of_small_layers(folder) -> None:
    report = measure(folder, ("lm_head",), Scheme(double_quant=True), progress_bar)
    found = {s.scheme: s for s in report.schemes}
    assert found[Scheme(double_quant=True)].relative == pytest.approx(report.relative, rel=1e-5)
    assert found[Scheme(scale="mse")].relative < found[Scheme()].relative
    assert found[Scheme(scale="mse")].expected is None
    assert found[Scheme(block_size=32)].relative < found[Scheme()].relative
    expected = nf4.expected_error(64, False, "int4").relative
    assert found[Scheme("int4")].expected == expected


def test_the_folder_holds_page_pictures_and_data(written) -> None:
    names = ("layers", "weights", "theory", "bits", "perplexity")
    files = {f"{name}.png" for name in names} | {"report.html", "report.json", "layers.csv"}
    assert {path.name for path in written.iterdir()} == files
    for name in names:
        assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((written / "report.json").read_text())
    assert len(report["layers"]) == 14 and len(report["worst"]) == 10
    assert report["layers"][0]["expected"]["relative"] == pytest.approx(0.0920, abs=1e-4)
    scored = [row["label"] for row in report["perplexities"]]
    assert scored[0] == "fp32" and scored[1:-1] == [s.label for s in scored_schemes()]
    assert scored[-1].endswith("least squares, double quantization, weighted by activations")
    rows = list(csv.DictReader((written / "layers.csv").read_text().splitlines()))
    assert [row["layer"] for row in rows] == [row["name"] for row in report["layers"]]
    assert float(rows[3]["relative"]) == report["layers"][3]["error"]["relative"]
    assert float(rows[3]["expected_mse"]) == report["layers"][3]["expected"]["mse"]


class Page(HTMLParser):
    """Collect the cells of the sortable table, and what a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.fetched: list[str] = []
        self.policy = ""
        self.inside = self.cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        named = dict(attributes)
        self.fetched += [named[key] for key in ("src", "href") if named.get(key)]
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"]
        if tag == "table":
            self.inside = named.get("class") == "sortable"
        if self.inside and tag == "tr":
            self.rows.append([])
        if self.inside and tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data) -> None:
        if self.cell:
            self.rows[-1][-1] += data


def test_the_page_needs_nothing_else(written) -> None:
    text = (written / "report.html").read_text()
    page = Page(text)
    assert len(page.fetched) == 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.fetched)
    assert "default-src 'none'" in page.policy
    assert not re.search(r"https?://", re.sub(r"base64,[^\"]+", "", text))
    assert "tiny &lt;llama&gt; &amp; co" in text and "<llama>" not in text
    assert len(page.rows) == 15 and page.rows[1][0] == "model.layers.0.mlp.down_proj"


def in_browser(*arguments: str) -> str:
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_in_a_browser(written, tmp_path) -> None:
    """Its pictures are drawn, and its script sorts the layers."""
    address = (written / "report.html").as_uri()
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    sorted_page = Page(in_browser(profile, "--dump-dom", f"{address}#sort=2"))
    errors = [float(row[2]) for row in sorted_page.rows[1:]]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    names = [row[0] for row in sorted_page.rows[1:]]
    assert names[0] == "model.layers.1.mlp.up_proj"
    by_name = Page(in_browser(profile, "--dump-dom", f"{address}#sort=0"))
    assert [row[0] for row in by_name.rows[1:]] == sorted(names, reverse=True)
    picture = tmp_path / "page.png"
    in_browser(profile, f"--screenshot={picture}", "--window-size=1200,1600", address)
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (1600, 1200)
    blue = (abs(pixels - [0, 0x72 / 255, 0xB2 / 255]) < 0.02).all(axis=2)
    assert blue.sum() > 500  # lines and bars of the pictures


def test_weights_are_put_back_after_perplexities(folder) -> None:
    model, _ = stand_in(folder)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    windows, other = torch.randint(320, (2, 2, 64))
    report = ErrorReport("tiny", Scheme())
    schemes = [Scheme(), Scheme("int4", 4096)]
    perplexities(report, model, windows, other, schemes, ("lm_head",), progress_bar)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    found = [row.perplexity for row in report.perplexities]
    assert len(set(found)) == 4 and report.tokens == 128
    exact = nf4.error.perplexity(model, windows)
    assert found[0] == exact
    nf4.quantize_model(model, double_quant=False)
    assert found[1] == pytest.approx(nf4.error.perplexity(model, windows), rel=1e-5)


def test_without_a_folder_only_the_layers_are_measured(folder, capsys) -> None:
    assert main(["error", str(folder), "--block-size", "32", "--no-double-quant", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schemes"] == [] and report["layers"][0]["bits_per_weight"] == 5.0
    assert report["scheme"] == {
        "codebook": "nf4", "block_size": 32, "double_quant": False, "scale": "absmax"
    }  # fmt: skip
    assert main(["error", str(folder), "--csv", "--skip", "mlp", "--skip", "lm_head"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 8 and not any("mlp" in row["layer"] for row in rows)
    assert main(["error", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "The 10 worst layers" in shown and "expected of normal weights" in shown
    assert shown.count("model.layers.1.mlp.up_proj") == 2


def test_a_report_without_signal_is_valid_json(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"a.weight": torch.zeros(8, 64)}, tmp_path / "zeros.safetensors")
    report = measure(tmp_path / "zeros.safetensors", (), Scheme(), progress_bar, compare=False)
    text = json.dumps(as_json(report), allow_nan=False)
    assert json.loads(text)["sqnr_db"] is None


def test_a_model_of_few_positions_is_refused_before_it_is_measured(
    folder, tmp_path, monkeypatch
) -> None:
    model, tokenizer = stand_in(folder)
    model.config.max_position_embeddings = 256
    monkeypatch.setattr("nf4.error.report.run.load_model", lambda source: (model, tokenizer))
    text = tmp_path / "text.txt"
    text.write_text("word " * 3000)
    with pytest.raises(ValueError, match="model: expected one of at least 512 positions.* got 256"):
        run_error(folder, (), Scheme(), str(text), 512, None, progress_bar)


def test_rows_without_a_number_are_sorted_last() -> None:
    from nf4.error.report.page import _cell

    assert _cell("inf", float("inf")) == '<td data-value="Infinity">inf</td>'
    assert _cell("nan", float("nan")) == '<td data-value="nan">nan</td>'
    assert _cell("<a>", "<a>") == "<td>&lt;a&gt;</td>"


def test_wrong_arguments_are_named_before_anything_is_measured(folder, tmp_path, capsys) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    for arguments, message in (
        ([str(folder), "--out", str(taken)], "out: expected a folder that does not exist yet"),
        ([str(folder), "--block-size", "48"], "block_size: expected a power of two"),
        ([str(folder), "--scale", "best"], "scale: expected one of absmax"),
        ([str(folder), "--perplexity", "no.txt"], "perplexity: expected a UTF-8 text file"),
        ([str(folder), "--perplexity", "wikipedia", "--tokens", "3"], "tokens: expected at least"),
        (["no-such-model"], "model: expected a folder, a file or one of smollm2"),
        ([], "model: expected a model or --codebooks, one of them"),
        ([str(folder), "--codebooks"], "model: expected a model or --codebooks, one of them"),
        (["--codebooks", "--csv"], "codebooks: expected --json or neither"),
    ):
        assert main(["error", *arguments]) == 2
        written = capsys.readouterr()
        assert written.err.startswith(f"nf4 error: {message}") and written.err.count("\n") == 1
        assert written.out == ""
    assert list(taken.iterdir()) == []


def test_nothing_is_left_of_a_report_that_fails(folder, tmp_path, monkeypatch) -> None:
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("nf4.error.report.run.as_csv", fail)
    monkeypatch.setattr("nf4.error.report.measure.compared", lambda: [Scheme(b) for b in ()])
    monkeypatch.setattr("nf4.error.report.page.page", lambda *_: "")
    with pytest.raises(OSError, match="no space left"):
        options = (("lm_head",), Scheme(), None, 4096, tmp_path / "out", progress_bar)
        run_error(folder, *options)
    assert list(tmp_path.iterdir()) == []


def test_codebooks_are_a_table(capsys, monkeypatch) -> None:
    from nf4.error import schemes

    few = [Scheme(), Scheme(block_size=128), Scheme("int4"), Scheme(scale="mse")]
    monkeypatch.setattr(schemes, "compared", lambda: few)
    monkeypatch.setattr(schemes.codebook_errors, "__defaults__", (1 << 16, 0, None, None))
    assert main(["error", "--codebooks"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"NF4 +theory +0\.00846 +0\.00914", shown)
    assert re.search(r"NF4, least squares +measured +0\.0068", shown)
    assert main(["error", "--codebooks", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["scheme"]["codebook"] for row in rows] == ["nf4", "nf4", "int4", "nf4"]
