"""Copies the chapters to build/solved; behind each, its exercises come once more, solved.

`make test` executes these copies: first a chapter as it is committed, then the part from its
first exercise to its end with each `exercise_N` replaced by `solution_N`, where a check that
does not accept the answer raises.
"""
import ast
import copy
import os
import re
import shutil
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
RAISES = "def attempt(check, answer):\n    check(answer)"


def defined(source: str) -> dict[str, ast.FunctionDef]:
    """The functions that a cell defines, by name."""
    code = "\n".join("" if line.startswith(("%", "!")) else line for line in source.splitlines())
    return {node.name: node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}


def solved(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The code cells from the first exercise on, each exercise with the body of its solution."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    functions = [{} if cell.source.startswith("%%") else defined(cell.source) for cell in cells]
    solutions = {name.removeprefix("solution_"): ast.unparse(node)
                 for names in functions for name, node in names.items()
                 if re.fullmatch(r"solution_\d+", name)}
    again = []
    for cell, names in zip(copy.deepcopy(cells), functions):
        numbers = [name.removeprefix("exercise_") for name in names if re.fullmatch(r"exercise_\d+", name)]
        for number in numbers:
            cell.source += f"\n\n\n{solutions[number]}\n\n\nexercise_{number} = solution_{number}"
        if again or numbers:
            again.append(cell)
    return again


def main() -> None:
    target = ROOT / "build" / "solved"
    shutil.rmtree(target, ignore_errors=True)
    (target / "chapters").mkdir(parents=True)
    # what chapters find beside their folder, and in it
    for path in (*ROOT.iterdir(), *(ROOT / "chapters").glob("*.py")):
        if path.name not in ("chapters", "build"):
            os.symlink(path, target / path.relative_to(ROOT))
    for path in sorted((ROOT / "chapters").glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, 4)
        again = solved(notebook)
        if again:
            notebook.cells += [nbformat.v4.new_code_cell(RAISES), *again]
        notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for number, cell in enumerate(notebook.cells):
            cell.update(outputs=[], execution_count=None, id=f"cell-{number}")
        nbformat.write(notebook, target / "chapters" / path.name)


if __name__ == "__main__":
    main()
