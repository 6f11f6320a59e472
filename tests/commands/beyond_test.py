"""The configs of other tasks than images, as the command trains them on made-up examples."""

import cli
import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "network"),
    [("takd_sst2", "bilstm_16"), ("dgkd_sst2", "bilstm_16"), ("dgkd_fb15k237", "complex_4")],
)
def test_the_command_trains_and_prints_the_table(config, network, tmp_path):
    if config.endswith("sst2"):
        pytest.importorskip("tokenizers")
    done = cli.run(
        "train", f"--config={config}:smoke", f"--workdir={tmp_path / 'run'}", quickly=True
    )
    assert done.returncode == 0, done.stderr
    assert network in done.stdout and "chain" in done.stdout
    rows, _ = cli.outcome(tmp_path / "run")
    assert [row["guidance"] for row in rows][:3] == ["none", "direct", "chain"]
    assert ("test_mrr" in rows[0]) == (config == "dgkd_fb15k237")
