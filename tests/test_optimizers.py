import pytest
import torch
from torch import nn

from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.models.checkpoints import load_classifier
from src.utils.training.optimizers import group_by_depth, measure_depths

ENCODER = FinetuneConfig(checkpoint="tiny:modernbert", revision="")
DECODER = DecoderConfig(checkpoint="tiny:qwen3", revision="", quantization="none", lora_rank=0)
LORA = DecoderConfig(checkpoint="tiny:qwen3", revision="", quantization="none", lora_rank=4)


@pytest.mark.parametrize(
    ("config", "kind", "depths"),
    [
        (
            ENCODER,
            "modernbert",
            {
                "classifier.weight": 0,
                "head.dense.weight": 0,
                "model.final_norm.weight": 1,
                "model.layers.2.mlp.Wi.weight": 1,
                "model.layers.0.attn.Wqkv.weight": 3,
                "model.embeddings.tok_embeddings.weight": 4,
                "model.embeddings.norm.weight": 4,
            },
        ),
        (
            DECODER,
            "qwen3",
            {
                "score.weight": 0,
                "model.norm.weight": 1,
                "model.layers.1.self_attn.q_proj.weight": 1,
                "model.layers.0.mlp.up_proj.weight": 2,
                "model.embed_tokens.weight": 3,
            },
        ),
        (
            LORA,
            "qwen3",
            {
                "base_model.model.score.modules_to_save.default.weight": 0,
                "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight": 1,
                "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight": 2,
            },
        ),
    ],
)
def test_depth_is_counted_from_the_head(tiny_base, config, kind, depths):
    found = measure_depths(load_classifier(config, tiny_base(kind))[0])
    assert {name: found[name] for name in depths} == depths


def test_layers_that_other_encoders_name_otherwise_are_found():
    class Classifier(nn.Module):
        base_model_prefix = "deberta"

        def __init__(self):
            super().__init__()
            self.deberta = nn.ModuleDict(
                {"embeddings": nn.Embedding(2, 2), "encoder": nn.ModuleDict()}
            )
            self.deberta["encoder"]["layer"] = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.deberta["encoder"]["rel_embeddings"] = nn.Embedding(2, 2)
            self.pooler = nn.Linear(2, 2)

    depths = measure_depths(Classifier())
    assert {
        name.removesuffix(".weight"): depth
        for name, depth in depths.items()
        if name.endswith("weight")
    } == {
        "deberta.embeddings": 3,
        "deberta.encoder.layer.0": 2,
        "deberta.encoder.layer.1": 1,
        "deberta.encoder.rel_embeddings": 3,
        "pooler": 0,
    }


def test_each_layer_learns_slower_than_the_one_above_and_each_weight_is_in_one_group(tiny_base):
    model, _ = load_classifier(ENCODER, tiny_base("modernbert"))
    decaying = {name for name, _ in model.named_parameters() if "norm" not in name}
    groups = group_by_depth(model, decaying, learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
    rate_of = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert (
        sum(len(group["params"]) for group in groups)
        == len(rate_of)
        == len(list(model.parameters()))
    )
    assert rate_of[id(model.classifier.weight)] == (1.0, 0.1) and groups[0]["lr"] == 1.0
    assert rate_of[id(model.head.norm.weight)] == (1.0, 0.0)
    assert [rate_of[id(layer.mlp.Wi.weight)] for layer in model.model.layers] == [
        (0.125, 0.1),
        (0.25, 0.1),
        (0.5, 0.1),
    ]
    assert rate_of[id(model.model.layers[1].mlp_norm.weight)] == (0.25, 0.0)
    assert rate_of[id(model.model.embeddings.tok_embeddings.weight)] == (0.0625, 0.1)
    torch.optim.AdamW(groups)
