"""Every public name of version 0.1.0 can still be imported."""

import importlib
import json
import warnings

import pytest

from helpers import ROOT

# what only its own module could use, and what chapters keep to themselves now
GONE = set(
    """
    data.SCHEMA
    evaluate.ScalingLaw
    evaluate.fit_scaling_law
    hf.Difference
    hf.first_difference
    search.PrefixCache
    serve.CHARACTERS
    serve.Item
    serve.LEAST
    serve.Reader
    serve.Reply
    serve.api_error
    serve.error_response
    serve.no_model
    serve.plain_response
    """.split()
)
NAMES = json.loads((ROOT / "tests" / "data" / "names_0_1_0.json").read_text())


@pytest.mark.parametrize("module", NAMES)
def test_the_names_of_0_1_0(module):
    imported = importlib.import_module(f"qwen_analog.{module}".rstrip("."))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        missing = {n for n in NAMES[module] if not hasattr(imported, n)}
    assert {f"{module}.{name}" for name in missing} <= GONE


def test_an_old_name_warns_and_is_the_new_thing():
    from qwen_analog import _renamed

    assert _renamed.MOVED
    for old, new in _renamed.MOVED.items():
        old_module, _, old_name = old.rpartition(".")
        new_module, _, new_name = new.rpartition(".")
        holder = importlib.import_module(f"qwen_analog.{old_module}")
        module = importlib.import_module(f"qwen_analog.{new_module}")
        value = getattr(module, new_name)
        if old_name in vars(holder):  # imported there for its own use
            assert vars(holder)[old_name] is value, old
            continue
        with pytest.warns(DeprecationWarning, match=f"qwen_analog.{new}"):
            assert getattr(holder, old_name) is value


def test_a_name_that_never_was_is_an_attribute_error():
    from qwen_analog import data

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        data.nothing
