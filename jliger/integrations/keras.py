"""Trains a language model of keras-hub without its logits."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

import jliger
from jliger.integrations.versions import check_version

check_version("keras")

import keras


class FusedCausalLM(keras.Model):
    """A `keras_hub.models.CausalLM` for training. It has the same layers and variables, and no logits.

    Its output is the backbone's, the last hidden states. Its loss is that of `CausalLM.compile(loss="auto")`, and it
    tracks the accuracy that `weighted_metrics="auto"` does. Keras must run on JAX. Data must be preprocessed:

        trainer = FusedCausalLM(causal_lm)
        trainer.compile(optimizer=keras.optimizers.Adam(2e-5))
        x, y, sample_weight = causal_lm.preprocessor(texts)
        trainer.fit(x, y, sample_weight=sample_weight, batch_size=8)
        causal_lm.generate("What is")

    Args:
      causal_lm: a model whose logits are `backbone.token_embedding(hidden, reverse=True)`.
      options: `z_loss`, `label_smoothing`, and other options of `jliger.fused_linear_cross_entropy`.
    """

    def __init__(self, causal_lm: keras.Model, **options: Any) -> None:
        if keras.backend.backend() != "jax":
            raise ValueError(f"keras.backend.backend() got {keras.backend.backend()!r}; set KERAS_BACKEND=jax.")
        backbone = causal_lm.backbone
        super().__init__(inputs=backbone.input, outputs=backbone.output)
        self.backbone = backbone
        self.options = options
        self.accuracy = keras.metrics.Mean("sparse_categorical_accuracy")

    def compile(self, optimizer: Any = "rmsprop", **kwargs: Any) -> None:
        """As `keras.Model.compile`, without losses and metrics, which would read the hidden states as logits."""
        for name in ("loss", "metrics", "weighted_metrics"):
            if kwargs.get(name):
                raise ValueError(f"{name} got {kwargs[name]!r}; leave it out.")
        super().compile(optimizer=optimizer, **kwargs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Float[Array, ""]:
        """The weighted sum of losses over the number of labels, as Keras divides it, plus what layers add.

        `y` are labels `[B, L]`, `y_pred` hidden states `[B, L, H]`, `sample_weight` None or weights `[B, L]`.
        """
        embedding = self.backbone.token_embedding
        kernel = embedding.embeddings if embedding.tie_weights else embedding.reverse_embeddings
        loss, metrics = jliger.fused_linear_cross_entropy(
            y_pred.astype(embedding.reverse_dtype or y_pred.dtype),
            jnp.asarray(kernel),
            jnp.asarray(y, jnp.int32),
            weights=sample_weight,
            kernel_layout="vh" if embedding.tie_weights else "hv",
            logit_softcap=embedding.logit_soft_cap,
            normalizer=y.size,
            return_metrics=True,
            **self.options,
        )
        self.accuracy.update_state(metrics.accuracy, sample_weight=metrics.weight)
        return loss + super().compute_loss(x, training=training)
