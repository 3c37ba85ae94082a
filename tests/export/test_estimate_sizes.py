from saigakit.export import estimate

BY_TYPE = {"F32": 538 * 10**6, "Q8_0": 145 * 10**6, "Q4_K_M": 105 * 10**6}


def texts(figure):
    axes = figure.axes[0]
    return [label.get_text() for label in axes.get_yticklabels()], [text.get_text() for text in axes.texts]


def test_base_adapter_and_every_quant_type_have_a_bar_with_the_size():
    names, values = texts(estimate.plot_sizes(538 * 10**6, 20 * 10**6, BY_TYPE, "Q4_K_M"))
    assert [name.splitlines()[-1] for name in names] == [
        "base model",
        "adapter",
        "F32",
        "Q8_0",
        "Q4_K_M  ← model.gguf",
    ]
    assert values == ["538.00", "20.00", "538.00", "145.00", "105.00"]


def test_large_models_are_shown_in_gigabytes():
    figure = estimate.plot_sizes(13_480_000_000, None, {"Q4_K_M": 4_080_000_000}, "Q4_K_M")
    assert texts(figure)[1] == ["13.48", "4.08"]
    assert "GB" in figure.axes[0].get_xlabel()


def test_the_plot_can_be_saved(tmp_path):
    estimate.plot_sizes(538 * 10**6, 20 * 10**6, BY_TYPE, "Q4_K_M").savefig(tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 10_000
