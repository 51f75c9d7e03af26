"""TRL's DPO on a small model, for the chapter on preferences to stand beside: the same
scrambled weights and the same answers for both.

TRL makes its own batch from texts, its own log-probabilities and its own loss.
"""

import tempfile
import warnings

import torch
from book import scramble_
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog.lora import TARGETS, add_lora

warnings.filterwarnings("ignore")  # the libraries warn of one another
disable_progress_bars()
OPTIONS = dict(
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    disable_tqdm=True,
)


def _qwen2(config: QwenConfig) -> Qwen2ForCausalLM:
    values = config.to_dict()
    rotation = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    return Qwen2ForCausalLM(Qwen2Config(**values, rope_parameters=rotation))


def _tokenizer(signs: str) -> PreTrainedTokenizerFast:
    """A token for each sign; "." ends an answer."""
    ids = {sign: i for i, sign in enumerate(signs)}
    plain = Tokenizer(models.WordLevel(ids, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=".", pad_token="?")


def _apart(pairs) -> float:
    """The largest difference of gradients, as a share of the largest gradient."""
    largest = max(p.grad.abs().max() for _, p in pairs)
    return max(((a.grad - b.grad).abs().max() / largest).item() for a, b in pairs)


class TrlDpo:
    """`DPOTrainer` on a Qwen2 with PEFT's adapters and texts as pairs."""

    def __init__(self, config: QwenConfig, signs: str, texts, beta: float):
        self.config = config
        rows = [dict(zip(("prompt", "chosen", "rejected"), text)) for text in texts]
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = DPOTrainer(
                _qwen2(config),
                args=DPOConfig(folder, beta=beta, **OPTIONS),
                train_dataset=Dataset.from_list(rows),
                processing_class=_tokenizer(signs),
                peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS)),
            )
        self.model = scramble_(self.trainer.model).eval()
        examples = [self.trainer.train_dataset[i] for i in range(len(rows))]
        self.batch = self.trainer.data_collator(examples)

    def loss(self) -> torch.Tensor:
        return self.trainer.compute_loss(self.model, self.batch)

    def _peer(self, name: str) -> torch.nn.Parameter:
        """What PEFT calls a parameter of ours."""
        layer, _, kind = name.rpartition(".")
        if layer.rpartition(".")[2] in TARGETS:
            kind = f"{kind}.default.weight" if "lora" in kind else f"base_layer.{kind}"
        return self.model.get_parameter(f"base_model.model.{layer}.{kind}")

    def twin(self) -> QwenForCausalLM:
        """Our model with adapters, and the same weights."""
        ours = add_lora(QwenForCausalLM(self.config), rank=4, alpha=8)
        with torch.no_grad():
            for name, p in ours.named_parameters():
                p.copy_(self._peer(name))
        return ours

    def gradients_apart(self, ours: QwenForCausalLM) -> float:
        named = ours.named_parameters()
        return _apart([(p, self._peer(name)) for name, p in named if p.requires_grad])
