"""Figures: what is drawn, and in whose colors."""

import sys

import numpy as np
import pytest

from lora_jax import analysis

SPECTRA = {f"layer_{k}/{n}": np.array([3.0, 1.0, 0.0]) for k in range(2) for n in "qv"}
CHANGE = {f"layer_{k}/q": np.array(0.1 * k) for k in range(3)} | {"head": np.array(0.5)}


@pytest.fixture(autouse=True)
def style():
    reason = "matplotlib, of the extra plot, is not installed"
    pytest.importorskip("matplotlib.figure", reason=reason)
    return pytest.importorskip("matplotlib.style", reason=reason)


def test_spectra_are_lines_by_layer_in_colors_by_module():
    (ax,) = analysis.plot_spectra(SPECTRA | {"stack/o": np.ones((2, 3))}).axes
    assert len(ax.lines) == 6
    assert [line.get_ydata().tolist() for line in ax.lines][:4] == [[3.0, 1.0]] * 4  # no zeros
    assert len({line.get_color() for line in ax.lines}) == 3
    (legend,) = ax.figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["layer_*/q", "layer_*/v", "stack/o"]


def test_changes_are_points_by_layer():
    found = CHANGE | {"stack/o": np.array([0.1, np.inf, 0.3]), "bias": np.array(np.inf)}
    found |= {f"model.layers.{k}.v_proj": np.array(0.2) for k in (0, 10)}
    (ax,) = analysis.plot_change(found).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn["layer_*/q"] == [[0, 0], [1, 0.1], [2, 0.2]]
    assert drawn["stack/o"] == [[0, 0.1], [2, 0.3]]
    assert [y for _, y in drawn["head"]] == [0.5, 0.5]
    assert drawn["model.layers.*.v_proj"] == [[0, 0.2], [10, 0.2]]
    assert "bias" not in drawn


def test_overlaps_are_a_map_for_each_weight_and_batch_entry():
    phi = {"a": np.eye(2), "stack": np.stack([np.eye(3)] * 5)}
    figure = analysis.plot_subspaces(phi)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["a", *(f"stack [{k}]" for k in range(5)), ""]  # and the bar
    assert figure.axes[1].images[0].get_clim() == (0, 1)
    assert figure.axes[1].images[0].get_extent() == [0.5, 3.5, 3.5, 0.5]


def test_colors_of_text_are_those_of_the_style(style):
    with style.context("dark_background"):
        figure = analysis.plot_change(CHANGE)
        assert figure.get_facecolor()[:3] == (0, 0, 0)
        assert figure.axes[0].yaxis.label.get_color() == "white"
    figure = analysis.plot_change(CHANGE)
    assert figure.get_facecolor() == (1, 1, 1, 1)  # opaque


def test_axes_may_be_given():
    from matplotlib.figure import Figure

    for draw, found in ((analysis.plot_spectra, SPECTRA), (analysis.plot_change, CHANGE)):
        ax = Figure().subplots()
        assert draw(found, ax) is ax.figure
        assert ax.get_legend() is not None
    ax = Figure().subplots()
    assert analysis.plot_subspaces({"a": np.eye(2)}, ax) is ax.figure
    with pytest.raises(ValueError, match=r"ax is for one map, and found has 2: pass \{key: found"):
        analysis.plot_subspaces({"a": np.ones((2, 2, 2))}, ax)


def test_misuse_is_explained(monkeypatch):
    for draw in (analysis.plot_spectra, analysis.plot_change, analysis.plot_subspaces):
        with pytest.raises(ValueError, match="found is empty: there is nothing to draw"):
            draw({})
    with pytest.raises(ValueError, match=r"found\['a'\] has shape \(\), expected \[\*batch, i, j"):
        analysis.plot_subspaces({"a": np.array(0.5)})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib, which is not installed: pip install 'lora"):
        analysis.plot_spectra(SPECTRA)
