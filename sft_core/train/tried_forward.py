"""How the trained model is run over a batch, tried on the model itself before its first use."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from sft_core.train.log_file import LogFile
from sft_core.train.loss import Forward
from sft_core.train.models.head import add_fused_head, takes_fused_head, wants_fused_head
from sft_core.train.models.router import RouterLoss
from sft_core.train.probe import Isolation, settle


class TriedForward:
    """Tries the model once: whether its packed documents see each other, and whether the fused head fits it.

    Adds the fused head on a GPU. of_class: probe.class_isolation's answer. log: the first rank writes the answer there.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        of_class: Isolation | None,
        router: RouterLoss | None,
        log: LogFile,
    ):
        network = model.get_base_model() if hasattr(model, "get_base_model") else model  # without PEFT's wrapper
        self._may_fuse_head = wants_fused_head(args.device) and takes_fused_head(network)
        if self._may_fuse_head:
            add_fused_head(network)
        self._attention = network.config._attn_implementation
        on_cpu, half = args.device.type == "cpu", args.bf16 or args.fp16
        self._is_exact = (
            on_cpu and not half and network.dtype == torch.float32
        )  # a GPU multiplies fp32 matrices in TF32
        self._args, self._of_class, self._router, self._log = args, of_class, router, log
        self._forward: Forward | None = None

    def of(self, model: Any) -> Forward:
        """How to run the model, which is wrapped for training. All ranks make the first call together."""
        if self._forward is None:
            self._forward, isolation = settle(
                model,
                self._of_class,
                attention=self._attention,
                device=self._args.device,
                exact=self._is_exact,
                may_fuse_head=self._may_fuse_head,
                router=self._router,
            )
            if self._args.process_index == 0:
                self._log.add(
                    {
                        "documents": "alone" if self._forward.alone else "together",
                        "packs_a_forward": self._args.per_device_train_batch_size,
                        "fused_head": self._forward.fused_head,
                        "told_by": isolation.document_inputs,
                        "attention": isolation.attention,
                        "evidence": isolation.evidence,
                    }
                )
        return self._forward
