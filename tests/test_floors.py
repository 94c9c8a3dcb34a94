"""The house: imports go down, the model knows no mesh, files keep to one idea, docs are current."""

import ast
import re
import subprocess
import sys

import pytest

FLOORS = [
    {"errors", "files", "hub", "launchers", "pickles", "signals"},
    {"config"},
    {"model", "data"},
    {"parallel"},
    {"checkpoint"},
    {"sae", "teacher"},
    {"hf"},
    {"evaluation", "compare"},
    {"interpret"},
    {"training"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room(module):
    return module.split(".")[1] if module.startswith("megacocomix.") else None


def test_no_import_goes_up(root):
    for path in (root / "megacocomix").rglob("*.py"):
        here = path.relative_to(root / "megacocomix").parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for module in imported_modules(path):
            there = room(module)
            if there in FLOOR:
                assert FLOOR[there] <= FLOOR[here], f"{path.relative_to(root)} imports {module}"


def test_a_config_is_read_without_torch(root):
    code = "import sys, megacocomix.config.load, megacocomix.config.rules; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_the_model_imports_nothing_distributed(root):
    for path in (root / "megacocomix/model").glob("*.py"):
        for module in imported_modules(path):
            assert not module.startswith(("torch.distributed", "deepspeed")), f"{path.name} imports {module}"


def test_deepspeed_is_touched_in_one_file(root):
    users = [
        p.name
        for p in (root / "megacocomix").rglob("*.py")
        if any(m.startswith("deepspeed") for m in imported_modules(p))
    ]
    # The first calls one public function, the one that joins the partitions of a ZeRO checkpoint.
    assert sorted(users) == ["deepspeed.py", "zero.py"]


def test_no_file_has_two_ideas(root):
    for path in [*root.glob("megacocomix/**/*.py"), *root.glob("tools/*.py"), *root.glob("launcher/*.py")]:
        assert len(path.read_text().splitlines()) <= 600, path


def test_the_options_page_is_current(root, tmp_path):
    page = tmp_path / "options.md"
    subprocess.run(["python", root / "tools/document_options.py", "--out", page], check=True)
    assert page.read_text() == (root / "docs/options.md").read_text(), "run: make docs"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/concepts.md",
        "docs/experiments.md",
        "docs/evaluation.md",
        "docs/methods.md",
        "docs/parallelism.md",
        "docs/runs.md",
        "docs/teachers.md",
        "docs/benchmarks.md",
        "assets/teacher/README.md",
    ],
)
def test_links_between_pages_lead_somewhere(root, page):
    text = (root / page).read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'(?:src|href)="([^":]+)"', text)
    for link in links:
        assert ((root / page).parent / link).exists(), f"{page} links {link}"
