"""The program that measures the errors of log-probabilities shows that float32 logits have smaller ones."""


def test_float32_logits_are_nearer_to_a_float32_head(import_example):
    found = list(import_example("logits_precision").records(64, 32, 512))
    assert len(found) == 8
    for narrow, wide in zip(found[::2], found[1::2], strict=True):
        assert (narrow["logits"], wide["logits"]) == ("bfloat16", "float32")
        assert narrow["kernel"] == wide["kernel"]
        # A float32 kernel is rounded to bfloat16 for the products, which float32 logits don't undo.
        assert wide["mean"] < narrow["mean"] / (1.2 if wide["kernel"] == "float32" else 20)
