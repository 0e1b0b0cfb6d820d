"""Views of a run in TensorBoard."""

from tensorboard.plugins.custom_scalar import layout_pb2

from oneformer_jax.train import dashboards


def test_tags_are_in_groups():
    names = {
        "loss": "loss/total",
        "loss_ce": "loss/ce",
        "loss_contrastive": "loss/contrastive",
        "loss_mask_12": "loss_layers/mask_12",
        "grad_norm": "norm/grad",
        "skipped_share": "health/skipped_share",
        "lr/main": "lr/main",
        "time/eta_seconds": "time/eta_seconds",
        "panoptic/PQ": "panoptic/PQ",
    }
    assert {name: dashboards.tag_of(name) for name in names} == names


def test_the_layout_opens_on_losses_scores_and_time():
    (value,) = dashboards.layout().value
    assert value.metadata.plugin_data.plugin_name == "custom_scalars"
    layout = layout_pb2.Layout.FromString(value.tensor.string_val[0])
    assert [category.title for category in layout.category] == ["Losses", "Scores", "Time"]
    patterns = [t for c in layout.category for chart in c.chart for t in chart.multiline.tag]
    assert "^loss/total$" in patterns and "^panoptic/PQ$" in patterns


def test_places_are_no_settings_to_compare():
    config = {"seed": 1, "dataset": {"name": "a", "data_dir": "x"}, "compilation_cache": "y"}
    assert dashboards.compared(config) == {"seed": 1, "dataset": {"name": "a"}}


def test_the_command_the_versions_and_the_config_are_texts(monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py", "--workdir=a b"])
    found = dashboards.texts('{\n "seed": 1\n}')
    assert found["run/command"] == "    main.py '--workdir=a b'"
    assert "oneformer_jax " in found["run/versions"] and "jax " in found["run/versions"]
    assert found["run/config"].splitlines()[1] == '     "seed": 1'
