"""Copies the chapters to build/solved, with each exercise solved where a reader would
solve it.

`make test` executes these copies. An exercise is first tried as it is committed; then
it becomes its solution, which its check must accept, and the rest of the chapter runs
with it.
"""

import ast
import os
import re
import shutil
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]


def is_call(statement: ast.stmt, name: str) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and getattr(statement.value.func, "id", "") == name
    )


def solution(cell: nbformat.NotebookNode) -> str:
    """What a solution's cell defines, without the proof that stands in it."""
    return "\n".join(
        ast.unparse(statement)
        for statement in ast.parse(cell.source).body
        if not is_call(statement, "prove")
    )


def solve(notebook: nbformat.NotebookNode) -> None:
    """Behind each `attempt(check_N, exercise_N)`, solve exercise N."""
    solutions = {
        number: cell
        for cell in notebook.cells
        if cell.cell_type == "code"
        for number in re.findall(
            r"^(?:(?:async )?def|class) solution_(\d+)", cell.source, re.MULTILINE
        )
    }
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        for number in re.findall(r"^attempt\(check_(\d+),", cell.source, re.MULTILINE):
            solved = (
                f"exercise_{number} ="
                f" solution_{number}\ncheck_{number}(exercise_{number})"
            )
            cells.append(
                nbformat.v4.new_code_cell(
                    solution(solutions.pop(number)) + "\n\n\n" + solved
                )
            )
    assert not solutions, f"no attempt at exercise {', '.join(solutions)}"
    notebook.cells = cells


def main() -> None:
    target = ROOT / "build" / "solved"
    shutil.rmtree(target, ignore_errors=True)
    (target / "chapters").mkdir(parents=True)
    # what chapters find beside their folder, and in it
    for path in (*ROOT.iterdir(), *(ROOT / "chapters").glob("*.py")):
        if path.name not in ("chapters", "build"):
            os.symlink(path, target / path.relative_to(ROOT))
    os.symlink(ROOT / "tests" / "forked_kernels.py", target / "conftest.py")
    for path in sorted((ROOT / "chapters").glob("[0-9AB]*.ipynb")):
        notebook = nbformat.read(path, 4)
        solve(notebook)
        nbformat.write(notebook, target / "chapters" / path.name)


if __name__ == "__main__":
    main()
