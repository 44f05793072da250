"""The tasks of a sweep: prompts from a file, a grid's combinations, a folder for each run."""

import pytest

from blockstream.errors import ConfigError
from blockstream.sweep.tasks import as_sets, grid_cells, read_prompts, tasks_of


def test_prompts_are_a_line_each_and_blank_lines_are_none(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red star\n\n  ein Fuß \n")
    prompts, digest = read_prompts(str(path))
    assert prompts == ["a red star", "ein Fuß"]
    path.write_text("\ufeffa red star\nein Fuß\n\n")  # with the mark that some editors begin a file with
    assert read_prompts(f"file://{path}") == (prompts, digest)
    path.write_text("a red star\nein Fuss\n")
    assert read_prompts(str(path))[1] != digest


@pytest.mark.parametrize(
    ("data", "said"), [(None, "No such file"), (b"\n \n", "no prompts"), (b"\xff\xfe", "codec")]
)
def test_a_file_without_prompts_is_refused_by_name(tmp_path, data, said):
    path = tmp_path / "prompts.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=said) as refused:
        read_prompts(str(path))
    assert str(path) in str(refused.value)


def test_a_grid_is_every_combination_as_sets():
    assert grid_cells([]) == [{}]
    cells = grid_cells(["steps=[2, 30]", "sampler=[euler, {name: lpl, leap: 2}]"])
    assert [c["steps"] for c in cells] == [2, 2, 30, 30]
    assert as_sets(cells[3]) == ["steps=30", 'sampler={"name": "lpl", "leap": 2}']


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        (["steps=3"], "write KEY="),
        (["steps"], "write KEY="),
        (["steps=[]"], "write KEY="),
        (["steps=[1]", "steps=[2]"], "there already"),
        (["prompts=[a, b]"], "its own prompts"),
        ([f"seed={list(range(40))}", f"steps={list(range(1, 40))}"], "1,560 combinations"),
    ],
)
def test_what_is_no_grid_is_refused(grids, said):
    with pytest.raises(ConfigError, match=said):
        grid_cells(grids)


def test_every_prompt_is_in_one_task_of_each_cell_and_no_two_tasks_share_a_folder():
    prompts = [str(n) for n in range(2345)]
    tasks = list(tasks_of(prompts, cells=3, batch=4))
    assert len({task.name for task in tasks}) == len(tasks)
    for cell in range(3):
        assert [p for t in tasks if t.cell == cell for p in t.prompts] == prompts
    folders = {task.name.rpartition("/")[0] for task in tasks}
    assert max(sum(t.name.startswith(f"{f}/") for t in tasks) for f in folders) <= 1000
    assert next(tasks_of(["a"], 1, 1)).name == "runs/0000/0000000"
