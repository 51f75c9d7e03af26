"""The right sides of the appendix on symptoms are those of the package."""

import faults
import pytest
import torch
from book import scramble_

from qwen_analog import attention
from qwen_analog.model import QwenModel


def test_step_by_step_attention_is_the_packages():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    ours = attention.grouped_query_attention(q, k, v)
    torch.testing.assert_close(faults.attend(q, k, v), ours)


def test_the_shown_forward_is_the_packages():
    model, ids = scramble_(faults.tiny()), torch.arange(6)[None]
    with (
        torch.no_grad(),
        faults.instead(QwenModel, "forward", faults.forward)["around"],
    ):
        found = model(ids)
    torch.testing.assert_close(found, model(ids))


def test_each_shown_line_is_the_edited_one():
    removed, added = faults.beside(faults.penalize, "logit * 2", "logit / 2")
    assert removed == ["return logit / 2 if logit > 0 else logit * 2"]
    assert added == ["return logit / 2 if logit > 0 else logit / 2"]
    broken = faults.edited(faults.penalize, "logit * 2", "logit / 2")
    assert (faults.penalize(-2.0), broken(-2.0)) == (-4.0, -1.0)


@pytest.mark.parametrize("section", faults.PARTS)
def test_a_check_finds_each_fault_of(section):
    names = [name for name, *_ in faults.findings(section)]
    assert len(names) == len(set(names)) > 0


def test_a_replaced_function_is_noticed_and_put_back():
    for name, function, right, wrong, owner in (*faults.MASKS, *faults.TRAINED):
        parts, code = faults.edit(function, right, wrong, owner)
        model, ids = scramble_(faults.tiny()), torch.arange(6)[None]
        with torch.no_grad():
            healthy = model(ids)
            with parts["around"]:
                assert not torch.allclose(model(ids), healthy), name
            assert torch.equal(model(ids), healthy)
        assert code.startswith(function.__qualname__)


def test_a_gallery_refuses_a_fault_that_no_check_notices():
    gallery = faults.Gallery(None, lambda **parts: None, None, [], ())
    with pytest.raises(AssertionError, match="harmless"):
        gallery.check("harmless", faults.penalize, "logit * 2", "2 * logit")
