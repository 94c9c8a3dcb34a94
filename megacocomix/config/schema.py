"""Every option of a run. load.py turns a YAML file and `section.key=value` overrides into one immutable `Config`.

The sentence under a field is its documentation; docs/options.md is generated from it. Rules between options are in
rules.py. Nothing here imports torch, so reading a config takes milliseconds.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field

from megacocomix.config.method import MethodConfig
from megacocomix.config.section import Decay, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Location = Literal["resid_post_mlp", "resid_post_attn", "resid_delta_mlp", "resid_delta_attn"]
SAEPrecision = Literal["fp32", "tf32"]


class ModelConfig(Section):
    """The student: a GPT-2 (pre-LayerNorm, learned positions, tied head, GELU MLP of 4 × width)."""

    num_layers: Positive
    """Number of transformer blocks."""
    hidden_size: Positive
    """Width D of the residual stream."""
    num_heads: Positive
    """Attention heads; must divide hidden_size."""
    context: Annotated[int, Field(ge=2)]
    """Tokens T in a training window; also the number of learned positions."""
    vocab_size: Positive
    """Rows of the tied embedding. At least the vocabulary size of the data and of the teacher."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout after embedding, attention and MLP. null means 0.0, or 0.1 with method.match_reference."""
    control_hidden_size: Positive | None = None
    """Width of a control with as many activated parameters (paper, appendix A). It replaces hidden_size if
    method.predict is nothing (ntp, kd, pause), unless the command line sets model.hidden_size."""


class TeacherConfig(Section):
    """The source of the teacher targets: concept labels, hidden states and next-token distributions."""

    model: str
    """Folder of the frozen teacher: a Hugging Face causal LM (safetensors), or a native run or checkpoint. It may have
    any size, but must have the student's tokenizer. A name on Hugging Face's hub is downloaded once."""
    sae: str | None = None
    """Sparse autoencoder on the teacher's residual stream: one safetensors file (tools/train_sae.py,
    tools/convert_sae.py). Only concept labels need it."""
    sae_layer: NonNegative = 5
    """Block (0-based) of the teacher whose residual the autoencoder reads, or whose hidden state is predicted."""
    location: Location = "resid_post_mlp"
    """Hook point in that block: after the block, after its attention, or the MLP's or attention's own contribution."""
    labels: str = "live"
    """live: the teacher labels each batch during training. Otherwise the folder of a label cache
    (tools/label_concepts.py); windows that are not in it are labelled live."""
    windowed: bool = False
    """Let the teacher read a window longer than its context in independent chunks. false refuses such a
    model.context."""
    precision: Literal["bf16", "fp32"] | None = None
    """Precision of the teacher; attribution is always fp32. null means bf16 on a GPU, fp32 on a CPU."""
    sae_precision: SAEPrecision = "fp32"
    """Precision in which a GPU multiplies by the autoencoder's encoder; a CPU does it in fp32. tf32 is faster, and
    changes a few labels (docs/teachers.md)."""


class DataConfig(Section):
    """Token shards written by tools/prepare_data.py, or token files of other projects."""

    train: str
    """Training tokens. Files of other projects: Megatron-LM's .bin with its .idx, llm.c's .bin, numpy's .npy, and ids
    without a header, such as the reference's train.bin."""
    valid: str
    """Held-out tokens."""
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] | None = None
    """The type of the ids in files without a header. null: uint16, after the whole file was checked for ids that look
    like those of another type."""
    tokenizer: str
    """gpt2 (shipped), a SentencePiece FILE.model, or a Hugging Face tokenizer folder. It must match the data's
    manifest."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: PositiveFloat
    """Peak learning rate, reached after warm-up."""
    min_lr: NonNegativeFloat
    """Learning rate where the cosine ends, one step after the last; the paper uses 10 % of lr."""
    warmup_steps: NonNegative
    """Steps of linear warm-up from 0; the paper uses 1/300 of training.steps."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    decay: Literal["matrices", "all"] | None = None
    """Parameters with weight decay. matrices: all but biases, LayerNorm and pre_bias. null means matrices, or all
    with method.match_reference."""
    clip: PositiveFloat = 1.0
    """Largest global gradient norm; a larger gradient is scaled down to it."""


class TrainingConfig(Section):
    """The training loop."""

    steps: Positive
    """Optimizer steps of the whole run and of its learning-rate schedule."""
    stop_after: Positive | None = None
    """Stop cleanly after this step. The learning-rate schedule does not change."""
    global_batch: Positive
    """Windows per step, over all ranks and accumulated micro-batches."""
    micro_batch: Positive
    """Windows that one data rank runs at a time. global_batch must be a multiple of micro_batch × data ranks."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps fp32 master weights and reduces gradients in fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: selective recomputes each block's attention in the backward pass, full the whole
    block."""
    init_from: str | None = None
    """Initial weights of a run that has no checkpoint yet: a native run or checkpoint, or any folder that
    tools/convert_checkpoint.py reads. A cocomix student may begin from a plain GPT-2; then only its concept module is
    initialised at random. null means that all weights are."""
    seed: NonNegative = 22
    """Seed of weights, sample order and dropout."""
    deterministic: bool = False
    """Use only deterministic kernels on a GPU, which are slower: a resumed run then equals an uninterrupted one to the
    bit. A CPU's are deterministic anyway. It may change between two starts."""


class ParallelConfig(Section):
    """How the model is distributed over the processes: pipeline × data × tensor ranks, where data = processes /
    (tensor × pipeline). docs/parallelism.md helps to choose."""

    tensor: Positive = 1
    """Tensor-parallel ranks. Heads, MLP columns, vocabulary and concepts are split among them."""
    sequence: bool | None = None
    """Sequence parallelism: tensor ranks also split the positions of LayerNorm, dropout and residual stream. null means
    true if tensor > 1."""
    pipeline: Positive = 1
    """Pipeline ranks. The blocks are split among them. The micro-batches of gradient accumulation flow through them."""
    virtual_stages: Positive = 1
    """Pipeline stages per rank. More than 1 interleaves them (interleaved 1F1B): a smaller bubble, more messages."""
    split_points: list[Positive] | None = None
    """First block of every pipeline stage except the first. null balances the stages' FLOPs."""
    zero: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage over the data ranks: 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    reshard_after_forward: bool | None = None
    """With zero 3, whether gathered weights are sharded again as soon as a module has run. false keeps them until the
    step ends: less communication, but the stage's low-precision weights stay in memory. null means false with zero 3
    under a pipeline, else true."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory and update the weights there (DeepSpeed's ZeRO-Offload)."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return self.pipeline * self.virtual_stages


class CheckpointConfig(Section):
    """When to save a checkpoint, and which to keep."""

    every: Positive = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: Positive = 3
    """Number of newest checkpoints kept."""
    keep_every: Positive | None = None
    """Checkpoints at multiples of this step are never deleted."""


class EvaluationConfig(Section):
    """Validation loss and benchmark tasks during training."""

    every: Positive = 500
    """Steps between validations. The last step is always validated."""
    batches: Positive = 100
    """Validate on the first this many × training.global_batch windows of data.valid, or on all if there are fewer."""
    tasks: list[str] = []
    """Names of lm-evaluation-harness tasks, scored as by tools/evaluate.py tasks."""
    tasks_every: Positive | None = None
    """Steps between scorings of the tasks. Each saves a checkpoint and scores it. The last step is always scored. null
    means only the last step."""
    tasks_data: str | None = None
    """Folder made by tools/fetch_eval_data.py. Data sets that are not in it come from Hugging Face's hub. null means
    data/eval, if that exists."""
    tasks_limit: Positive | None = None
    """Score only the first this many samples of each task. null means all."""


class LoggingConfig(Section):
    """Where metrics go. RUN/metrics.jsonl is always written."""

    every: Positive = 50
    """Steps between lines of training metrics."""
    wandb: bool = False
    """Log to Weights & Biases. Without a key, or if the service fails, it logs offline, under the run folder."""
    tensorboard: bool = False
    """Write TensorBoard events under RUN/tensorboard. Needs the package tensorboard."""


class Config(Section):
    """One run."""

    run: str
    """The run folder. A run writes only into it. An existing run of the same config is resumed."""
    model: ModelConfig
    method: MethodConfig
    teacher: TeacherConfig | None = None
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()


def section_type(section: str) -> type[Section] | None:
    """The class of a section, None for a plain key such as run."""
    annotation = Config.model_fields[section].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
