"""README's commands are run as they are written, on tiny data, and its map of the repository is held to the files."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")

# Stands before the real command on the PATH and makes everything small; what is run is otherwise what README says.
WRAPPER = """#!/bin/bash
case "$1 $2" in
  "data demo") exec {mmscale} "$@" --source scenes --limit 24 ;;
  train*|launch*) exec {mmscale} "$@" train.duration=2 data.batch_size=8 model.width=32 model.depth=1 \\
      model.num_heads=2 evals.num_generated=4 evals.batch_size=8 ;;
  *) exec {mmscale} "$@" ;;
esac
"""


def test_make_targets_named_in_the_readme_exist():
    targets = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_path_in_the_map_exists():
    block = re.search(r"^```text\n(README.md.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block, "README has no map of the repository"
    for line in block[1].splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_run_as_written(tmp_path):
    assert BLOCKS, "README has no ```bash blocks"
    run_blocks(BLOCKS, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_and_snippets_of_the_data_page_run_as_written(tmp_path):
    """From a folder of pictures with captions, in the page's order."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        Image.new("RGB", (80, 64), (6 * number, 90, 255 - 6 * number)).save(photos / f"{number:02d}.jpg")
        (photos / f"{number:02d}.txt").write_text(f"a plain ground of colour {number}")
    found = re.findall(r"^```(bash|python)\n(.*?)^```", DATA, re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in found} == {"bash", "python"}
    for kind, block in found:
        if kind == "bash":
            run_blocks([block], tmp_path)
        else:
            done = subprocess.run(
                [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{block}\n{done.stderr[-4000:]}"
    assert (tmp_path / "preview" / "contact_sheet.png").stat().st_size > 1000
    assert (tmp_path / "runs" / "photos" / "report.json").is_file()


def test_links_of_the_data_page_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", DATA):
        assert (ROOT / "docs" / target).exists(), target
    for path in re.findall(r"`((?:tests|benchmarks)/[a-z_/]+\.(?:py|json))`", DATA):
        assert (ROOT / path).exists(), path


def run_blocks(blocks, tmp_path):
    real = Path(sys.executable).with_name("mmscale")
    wrapper = tmp_path / "bin" / "mmscale"
    wrapper.parent.mkdir(exist_ok=True)
    wrapper.write_text(WRAPPER.format(mmscale=real))
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    env = {**os.environ, "PATH": f"{wrapper.parent}:{real.parent}:{os.environ['PATH']}"}
    for block in blocks:
        commands = "\n".join(
            line for line in block.splitlines() if not line.startswith(("make ", "git ", "cd "))
        )
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_python_runs_as_written(number):
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), {})


def test_kernels_are_shown_in_a_few_lines():
    operators = (
        "contrastive_loss",
        "sigmoid_loss",
        "cross_modal_attention",
        "packed_attention",
        "deformable_attention",
    )
    for name in operators:
        assert any(f"{name}(" in snippet for snippet in SNIPPETS), name
    for snippet in SNIPPETS:
        lines = [line for line in snippet.splitlines() if line and not line.startswith(("import ", "from "))]
        assert len(lines) <= 5, snippet
