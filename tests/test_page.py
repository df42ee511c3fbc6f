# SPDX-License-Identifier: Apache-2.0
"""The page: valid, closed in itself, escaped, with a text for every picture; and in a browser as wide as a phone."""

import functools
import json
import re
import shutil
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast import report
from fisherfast.report import words
from fisherfast.timing import TimeRatio

HOSTILE = "<script>alert('x')</script>&amp;\"$\\frac$"
VOID = {"meta", "link", "br", "hr", "img", "input"}
SECTIONS = ["Summary", "Before you use these numbers", "By layer", "Charts", "Settings", "Terms"]
CHARTS = ["Nats by layer", "Spectrum of the Fisher", "Over the price of a nat", "Rate-distortion curve"]


class Page(HTMLParser):
    """A page read: raises at a tag that is not closed in order; elements with their attributes, text by element."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text_of(self, tag):
        return [text for name, text in self.texts if name == tag and text]


def network(first="first"):
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, layer in {first: nn.Linear(5, 7), "tanh": nn.Tanh(), "last": nn.Linear(7, 3)}.items():
        net.add_module(name, layer)
    return net


def measured(net, structure="diagonal", **options):
    torch.manual_seed(1)
    F = ff.fisher(net, [(torch.randn(11, 5), torch.randint(3, (11,)))], structure=structure, progress=False)
    info = ff.information_in_weights(F, net, **({"prior_scale": "fit", "beta": 1 / 11} | options))
    return F, info


@functools.cache
def page(net=None, structure="diagonal", **options):
    net = net or network()
    F, info = measured(net, structure, **options)
    return report.page(F, info, curve=report.rate_distortion(F, net, info), command="fisherfast info --out 'a <b>'")


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "gram"])
def test_page_is_valid_and_has_every_section(structure):
    read = Page(page(structure=structure))
    assert read.text_of("h2") == SECTIONS and read.text_of("h3") == CHARTS and len(read.text_of("h1")) == 1
    assert [meta["content"] for meta in read.all("meta") if meta.get("name") == "viewport"] == [
        "width=device-width, initial-scale=1"
    ]
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["aria-labelledby"] for _, attributes in read.elements if "aria-labelledby" in attributes} <= set(ids)
    references = [value for _, attributes in read.elements for value in re.findall(r"url\(#([^)]*)\)", str(attributes))]
    assert references and {*references, *(use["href"].removeprefix("#") for use in read.all("use"))} <= set(ids)


def test_every_picture_has_a_text():
    read = Page(page())
    pictures = read.all("svg")
    assert len(pictures) == len(CHARTS) and not read.all("img")
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 40 for picture in pictures)
    assert all("width" not in picture and picture["viewbox"] for picture in pictures)
    assert "last" in pictures[0]["aria-label"] and "0.0909" in pictures[2]["aria-label"]


def test_nothing_is_fetched_and_nothing_runs():
    html = page()
    read = Page(html)
    assert not re.search(r"https?:|//\w|@import|javascript:", html)
    assert not {tag for tag, _ in read.elements} & {"script", "iframe", "object", "embed", "form", "base"}
    assert all(link["href"] == "data:," for link in read.all("link"))
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on") or name == "src"]
    (policy,) = (meta["content"] for meta in read.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_names_are_escaped_everywhere():
    html = page(network(HOSTILE))
    read = Page(html)
    assert "<script" not in html and "<b>" not in html
    assert HOSTILE in read.text_of("th") and HOSTILE in read.text_of("text") and HOSTILE in read.all("svg")[0]["aria-label"]
    assert "fisherfast info --out 'a <b>'" in " ".join(read.text_of("dd"))


def test_numbers_and_settings_are_those_of_the_run():
    net = network()
    F, info = measured(net)
    ratio = TimeRatio(0.09, 0.1, 5, 11)
    made = datetime(2026, 11, 25, 12, 30, tzinfo=UTC)
    read = Page(report.page(F, info, ratio, curve=report.rate_distortion(F, net, info), date=made))
    cells = [*read.text_of("th"), *read.text_of("td")]
    for name, layer in info.by_layer().items():
        for part in (name, f"{layer.nats:,.1f}", f"{layer.trace:.3g}", f"{layer.share:.1%}", f"{layer.prior_scale:.3g}"):
            assert part in cells
    values = read.text_of("dd")
    for part in (
        "Sequential",
        "diagonal",
        "mc",
        "categorical",
        "11",
        "66",
        "0.0909091",
        "2026-11-25 12:30 UTC",
        torch.__version__,
    ):
        assert part in values
    assert str(ratio) in values and "called from Python" in values


def test_every_term_has_one_sentence():
    assert all(sentence.endswith(".") and ". " not in sentence for sentence in words.TERMS.values())
    assert {"nat", "beta", "Fisher", "trace", "prior, lambda", "rate-distortion curve", "structure"} <= set(words.TERMS)


def warned(F, info):
    return " ".join(words.warnings(F, info))


def test_warnings_say_what_is_doubtful():
    net = network()
    text = warned(*measured(net))
    assert "One label was drawn per sample" in text and "fitted to the trained weights" in text

    def made(how, entries=1.0, **options):
        F = ff.DiagonalFisher(
            {n: torch.full_like(p, entries) for n, p in net.named_parameters()}, 7, provenance=ff.Provenance(**how)
        )
        return F, ff.information_in_weights(F, net, **({"prior_scale": 1.0, "beta": 0.1} | options))

    assert "is not the Fisher" in warned(*made({"fisher_type": "empirical"}))
    assert "not known" in warned(*made({}))
    assert "printed in the paper" in warned(*made({"fisher_type": "exact"}, variant="paper"))
    assert "is zero, the predictions do not depend on their weights: first, last." in warned(*made({"fisher_type": "exact"}, 0.0))
    assert warned(*made({"fisher_type": "exact"})) == ""
    assert Page(report.page(*made({"fisher_type": "exact"}))).text_of("li") == ["None."]
    assert Page(report.page(*measured(net))).text_of("li") == words.warnings(*measured(net))


def test_parameters_left_out_are_said():
    F = ff.DiagonalFisher({"a.w": torch.ones(3)}, 7, coverage={f"b{i}.w": "missing: no rule" for i in range(12)})
    with pytest.warns(ff.FisherWarning, match="exclude parameters that the Fisher lacks"):
        info = ff.information_in_weights(
            F, {"a.w": torch.ones(3)} | {f"b{i}.w": torch.ones(3) for i in range(12)}, prior_scale=1.0, beta=0.1
        )
    assert "leave out parameters that the Fisher lacks: b0.w, b1.w" in warned(F, info) and "and 2 more" in warned(F, info)


def test_curve_goes_through_the_chosen_point_and_trades_nats_for_loss():
    net = network()
    for options in ({}, {"prior_scale": 0.3}, {"variant": "paper"}):
        F, info = measured(net, **options)
        curve = report.rate_distortion(F, net, info)
        at = len(curve.betas) // 2
        assert curve.betas[at] == info.beta and curve.nats[at] == pytest.approx(info.kl, rel=1e-12)
        assert curve.rises[at] == pytest.approx(info.lagrangian_rise - info.beta * info.kl, rel=1e-9)
        variance, diagonal = info.posterior_variance(), F.diagonal(dtype=torch.float64)
        half_trace = sum(float((diagonal[name] * variance[name]).sum()) for name in diagonal) / 2
        assert curve.rises[at] == pytest.approx(half_trace, rel=1e-9)
        assert list(curve.nats) == sorted(curve.nats, reverse=True) and list(curve.rises) == sorted(curve.rises)


def test_slope_of_the_curve_is_minus_beta():
    """The envelope theorem: d rise / d nats = -beta, also where the prior is fitted anew for every beta."""
    net = network()
    for scale in ("fit", 0.3):
        F, info = measured(net, prior_scale=scale)
        near = report.rate_distortion(F, net, info, factors=(1 - 1e-4, 1 + 1e-4))
        slope = (near.rises[1] - near.rises[0]) / (near.nats[1] - near.nats[0])
        assert slope == pytest.approx(-info.beta, rel=1e-6)


def test_curve_takes_the_center_of_the_information():
    net, start = network(), network()
    F, info = measured(net, prior_scale=0.3, center=start)
    assert report.rate_distortion(F, net, info, center=start).nats[6] == pytest.approx(info.kl, rel=1e-12)
    with pytest.raises(ValueError, match="rate_distortion: center must be that of info, got none"):
        report.rate_distortion(F, net, info)


def test_thousands_of_layers():
    names = [f"model.layers.{i}.self_attention.query_key_value_projection" for i in range(2000)]
    F = ff.DiagonalFisher({f"{name}.w": torch.full((2,), 1.0 + i) for i, name in enumerate(names)}, 7)
    info = ff.information_in_weights(F, {f"{name}.w": torch.ones(2) for name in names}, prior_scale=1.0, beta=0.1)
    html = report.page(F, info)
    read = Page(html)
    assert read.text_of("h3") == CHARTS[:2]
    assert set(names) <= set(read.text_of("th"))
    drawn = read.text_of("text")
    assert "1,960 other layers, summed" in drawn and sum("…" in text for text in drawn) == 40
    assert "projection" in read.all("svg")[0]["aria-label"] and "other layers" not in read.all("svg")[0]["aria-label"]
    assert any("The 40 largest are drawn" in text for text in read.text_of("figcaption"))
    assert len(html) < 2e6


def test_page_of_a_fisher_that_is_zero():
    F = ff.DiagonalFisher({"a.w": torch.zeros(3)}, 7)
    weights = {"a.w": torch.ones(3)}
    info = ff.information_in_weights(F, weights, prior_scale="fit", beta=0.1)
    read = Page(report.page(F, info, curve=report.rate_distortion(F, weights, info)))
    assert "none above zero" in read.all("svg")[1]["aria-label"] and "inf" in read.text_of("td")


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless chromium as wide as a phone, and a page with everything long on it."""
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    assert chromium and driver, "needs chromium and chromedriver; on Debian: apt-get install chromium chromium-driver"
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    folder = tmp_path_factory.mktemp("browser")
    quiet = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    for argument in ("--headless", "--no-sandbox", *quiet, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": {"width": 390, "height": 844, "pixelRatio": 2.0}})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started, folder
    started.quit()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("first", ["first", "a.module.with_a_very_long_name_" * 6, HOSTILE])
def test_page_fits_a_phone(browser, scheme, first):
    started, folder = browser
    path = folder / "report.html"
    path.write_text(page(network(first.replace(".", "_")), "kfac"), encoding="utf-8")
    started.get_log("performance")
    started.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    started.get(path.as_uri())
    for details in started.find_elements("tag name", "details"):
        started.execute_script("arguments[0].open = true", details)
    inner, scroll = started.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert inner == 390 and scroll <= inner
    assert started.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in started.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert path.as_uri() in asked and all(url.startswith(("file:", "data:")) for url in asked)
    paper, ink = started.execute_script(
        "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color].map(c => c.match(/\\d+/g).map(Number))"
    )
    assert (sum(paper) > sum(ink)) == (scheme == "light")
    outside = started.execute_script(
        "return [...document.querySelectorAll('svg text')].filter(t => { const r = t.getBoundingClientRect(),"
        " card = t.closest('figure').getBoundingClientRect(); return r.left < card.left || r.right > card.right; })"
        ".map(t => t.textContent)"
    )
    assert outside == []
