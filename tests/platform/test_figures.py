"""Figures say what they should, draw without a display and take what runs really give them."""

import io
import subprocess
import sys

import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from nsa_platform import figures

STEPS = range(0, 60, 5)


def health(layers: int, names: tuple[str, ...]) -> figures.Health:
    return [
        (step, {layer: {name: 0.1 + layer / 100 for name in names} for layer in range(layers)})
        for step in STEPS
    ]


def texts(figure: Figure) -> str:
    """All words of a figure, after drawing it."""
    figure.savefig(io.BytesIO(), format="png")
    return "\n".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata().tolist()]  # type: ignore[union-attr]


def test_loss_curve_shows_training_validation_and_baselines() -> None:
    train = [(step * 1000, 5.0 - step / 40) for step in range(100)]
    figure = figures.loss_curve(
        train, [(0, 5.0), (99_000, 2.61)], unit="bits per byte", baselines={"bigram": 3.25}
    )
    words = texts(figure)
    for word in (
        "tokens seen",
        "loss (bits per byte)",
        "smoothed",
        "held-out",
        "bigram 3.25",
        "2.61",
    ):
        assert word in words
    raw, smooth, valid, baseline = figure.axes[0].get_lines()
    assert points(raw) == train
    middle = [loss for _, loss in points(smooth)[10:-10]]
    assert middle == pytest.approx([loss for _, loss in train[10:-10]]), "smoothing does not lag"
    assert points(valid) == [(0, 5.0), (99_000, 2.61)]
    assert [loss for _, loss in points(baseline)] == [3.25, 3.25]
    assert "smoothed" not in texts(figures.loss_curve(train[:10]))
    texts(figures.loss_curve([]))


@pytest.mark.parametrize("layers", [1, 4, 24])
def test_gates_have_a_panel_for_each_branch_and_a_line_for_each_layer(layers: int) -> None:
    figure = figures.gate_means(health(layers, ("cmp", "slc", "win")))
    words = texts(figure)
    panels = [axes for axes in figure.axes if axes.get_lines()]
    assert [axes.get_title() for axes in panels] == ["compressed", "selected", "sliding"]
    assert [len(axes.get_lines()) for axes in panels] == [layers] * 3
    assert all(axes.get_ylim() == (0, 1) for axes in panels)
    assert ("layer 0" in words) == (layers <= 8)
    assert "gate (0 closed, 1 open)" in words
    texts(figures.gate_means([]))
    full = figures.gate_means(health(layers, ("full",)))
    assert [a.get_title() for a in full.axes if a.get_lines()] == ["full attention"]


def test_entropy_leaves_out_layers_without_any() -> None:
    history = [(1, {0: {"entropy": 0.5}, 1: {"cmp": 0.5}}), (2, {0: {"entropy": 0.4}, 1: {}})]
    figure = figures.selection_entropy(history)
    texts(figure)
    assert [len(points(line)) for line in figure.axes[0].get_lines()] == [2, 0]


def test_distances_are_named_in_blocks_and_empty_buckets_left_out() -> None:
    shares = {0: [0.5, 0.25, 0.25, 0, 0], 1: [0.5, 0.5, 0, 0, 0]}
    figure = figures.selected_distance(shares, block_size=64)
    words = texts(figure)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["own", "1", "2-3"]
    assert "in blocks of 64 tokens" in words
    assert "50%" in words
    crowded = figures.selected_distance({i: [0.1] * 10 for i in range(30)}, block_size=64)
    assert "256-511" in texts(crowded)
    assert "512-1,023" not in texts(crowded)


def test_expert_load_is_centred_on_an_even_load() -> None:
    figure = figures.expert_load({1: [1.0, 0.5, 1.5], 2: [0.0, 3.0, 0.0]})
    axes = figure.axes[0]
    assert axes.images[0].get_clim() == (0, 2)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
    words = texts(figure)
    assert all(word in words for word in ("0.50", "3.00", "load over the mean"))


def test_needle_maps_have_depths_down_and_lengths_across() -> None:
    figure = figures.needle_map(
        [256, 1024], [0.0, 0.5, 1.0], [[1, 0], [0.5, 0.5], [0, 1]], label="found", title="Needles"
    )
    words = texts(figure)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "1,024"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "50%", "100%"]
    assert axes.images[0].get_clim() == (0, 1)
    assert "found" in words
    lift = figures.needle_map([256], [0.5], [[-3.5]], label="nats", title="Worth", percent=False)
    assert "-3.50" in texts(lift)
    assert lift.axes[0].images[0].get_clim() == (-3.5, 3.5)
    noise = figures.needle_map([256], [0.5], [[0.1]], label="nats", title="Worth", percent=False)
    assert noise.axes[0].images[0].get_clim() == (-1, 1)


def test_loss_by_position_leaves_a_gap_where_nothing_was_counted() -> None:
    figure = figures.loss_by_position(
        [0, 8, 16, 24], [2.5, None, 2.25], unit="bits per byte", baselines={"unigram": 4.5}
    )
    words = texts(figure)
    for word in ("2.50", "2.25", "unigram 4.50", "position in the context (tokens)"):
        assert word in words
    assert "nan" not in words


def test_bars_carry_their_values() -> None:
    words = texts(figures.bars(["model", "bigram"], [2.1234, 3.5], unit="bits", title="Text"))
    for word in ("model", "bigram", "2.123", "3.500", "bits", "Text"):
        assert word in words


def test_scores_carry_their_intervals_and_leave_out_what_is_not_measured() -> None:
    figure = figures.bars(["4096"], [0.5], intervals=[(0.4, 0.7)], unit="score", title="vt")
    (lines,) = figure.axes[0].collections
    assert isinstance(lines, LineCollection)
    assert lines.get_segments()[0][:, 0].tolist() == pytest.approx([0.4, 0.7])
    words = texts(
        figures.scores(["vt", "cwe"], ["4,096", "8,192"], [[1, 0.25], [0.5, None]], title="x")
    )
    for word in ("vt", "cwe", "8,192", "100%", "25%", "50%"):
        assert word in words
    assert "nan" not in words


def test_no_display_is_ever_asked_for() -> None:
    code = "import sys; from nsa_platform.figures import png; "
    code += "sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_whoever_draws_and_records_nothing_loads_neither_matplotlib_nor_mlflow() -> None:
    code = "import sys; from nsa_platform import figures, tracking; "
    code += "sys.exit(not {'matplotlib', 'mlflow'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_throughput_has_a_line_for_each_attention_and_names_its_rates() -> None:
    rates = {"NSA": [(32768, 900.0), (8192, 1000.0)], "dense": [(8192, 1100.0)]}
    figure = figures.throughput(rates)
    words = texts(figure)
    assert {"NSA", "dense", "8,192", "32,768", "1,100"} <= set(words.split("\n"))
    lines = {str(line.get_label()): points(line) for line in figure.axes[0].get_lines()}
    assert lines["NSA"] == [(8192, 1000), (32768, 900)]


def test_efficiency_has_a_line_for_each_way_to_share() -> None:
    figure = figures.efficiency(
        {"context 4": [(4, 0.85), (1, 1.0)], "state": [(1, 1.0), (2, 0.97)]}
    )
    assert {"context 4", "state", "85%", "97%"} <= set(texts(figure).split("\n"))
    lines = {str(line.get_label()): points(line) for line in figure.axes[0].get_lines()}
    assert lines["context 4"] == [(1, 1.0), (4, 0.85)]
    assert list(figure.axes[0].get_xticks()) == [1, 2, 4]
