"""Every option of a run: YAML file + `section.key=value` overrides → one frozen, fully resolved `Config`.

The sentence under a field is its documentation; docs/options.md is generated from it. Rules that span fields or look at
files are in validate.py. Nothing here touches torch, so a config is read in milliseconds.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field

from megacocomix.config.method import MethodConfig
from megacocomix.config.section import Decay, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Location = Literal["resid_post_mlp", "resid_post_attn", "resid_delta_mlp", "resid_delta_attn"]


class ModelConfig(Section):
    """The student: a GPT-2 (pre-LayerNorm, learned positions, tied head, GELU MLP of 4 × width)."""

    num_layers: Positive
    """Number of transformer blocks."""
    hidden_size: Positive
    """Width D of the residual stream."""
    num_heads: Positive
    """Attention heads; must divide hidden_size."""
    context: Annotated[int, Field(ge=2)]
    """Tokens T in a training window, and the number of learned positions."""
    vocab_size: Positive
    """Rows of the tied embedding. At least the vocabulary of the data and of the teacher."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout after embedding, attention and MLP. null means 0.0, or 0.1 with method.match_reference."""
    control_hidden_size: Positive | None = None
    """Width of a control with as many activated parameters (paper, appendix A). Where method.predict is nothing (ntp,
    kd, pause) it takes the place of hidden_size, unless the command line sets model.hidden_size."""


class TeacherConfig(Section):
    """Where concept labels, hidden states and distributions to learn come from."""

    model: str
    """Folder of the frozen teacher: a Hugging Face causal LM (safetensors), or a run or checkpoint of ours. Its size is
    independent of the student's, its tokenizer is not. A name on Hugging Face's hub is downloaded once."""
    sae: str | None = None
    """Sparse autoencoder on the teacher's residual stream: one safetensors file (tools/train_sae.py,
    tools/convert_sae.py). Concept labels need it, nothing else does."""
    sae_layer: NonNegative = 5
    """Block (0-based) whose residual the autoencoder reads, or whose hidden state is predicted."""
    location: Location = "resid_post_mlp"
    """Where in that block: after the block, after its attention, or the MLP's or attention's own contribution."""
    labels: str = "live"
    """live: the teacher labels each batch during training. Else the folder of a label cache (tools/label_concepts.py);
    windows that it does not hold are labelled live."""
    windowed: bool = False
    """Read a window longer than the teacher's context in chunks, each by itself. false refuses such a model.context."""
    precision: Literal["bf16", "fp32"] | None = None
    """What the teacher computes in; attribution is fp32 in either. null means bf16 on a GPU, fp32 on a CPU."""


class DataConfig(Section):
    """Token shards, as tools/prepare_data.py writes them, or the reference's uint16 train.bin / val.bin."""

    train: str
    """Training tokens."""
    valid: str
    """Held-out tokens."""
    tokenizer: str
    """gpt2 (shipped), a SentencePiece FILE.model, or a Hugging Face tokenizer folder; checked against the data's
    manifest."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: PositiveFloat
    """Largest learning rate, reached after warm-up."""
    min_lr: NonNegativeFloat
    """Learning rate at the last step; the paper takes 10 % of lr."""
    warmup_steps: NonNegative
    """Steps of linear warm-up from 0; the paper takes 1/300 of training.steps."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    decay: Literal["matrices", "all"] | None = None
    """What decays. matrices: all but biases, LayerNorm and pre_bias. null means matrices, or all with
    method.match_reference."""
    clip: PositiveFloat = 1.0
    """Largest global gradient norm."""


class TrainingConfig(Section):
    """The loop."""

    steps: Positive
    """Optimizer steps of the schedule."""
    stop_after: Positive | None = None
    """End cleanly after this step; the learning-rate schedule still runs to steps."""
    global_batch: Positive
    """Sequences a step over all ranks and accumulated micro-batches."""
    micro_batch: Positive
    """Sequences one data rank runs at a time. global_batch must be a multiple of micro_batch × data ranks."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps fp32 master weights and reduces gradients in fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: selective recomputes each block's attention in the backward pass, full the whole
    block."""
    init_from: str | None = None
    """Weights to begin with where the run has no checkpoint yet: a run or checkpoint of ours, or any folder that
    tools/convert_checkpoint.py reads. A cocomix student may begin from a plain GPT-2: its concept module is then drawn.
    null means all are drawn."""
    seed: NonNegative = 22
    """Seeds weights, sample order and dropout."""


class ParallelConfig(Section):
    """How the model is spread over the processes: pipeline × data × tensor ranks, data = processes / (tensor ×
    pipeline). docs/parallelism.md says what to choose."""

    tensor: Positive = 1
    """Tensor-parallel ranks: heads, MLP columns, vocabulary and concepts are split among them."""
    sequence: bool | None = None
    """Sequence parallelism: tensor ranks also split the positions of LayerNorm, dropout and residual stream. null means
    true where tensor > 1."""
    pipeline: Positive = 1
    """Pipeline ranks: the blocks are split among them. Gradient accumulation makes their micro-batches."""
    virtual_stages: Positive = 1
    """Pipeline stages a rank; more than 1 interleaves them (interleaved 1F1B): a smaller bubble for more messages."""
    split_points: list[Positive] | None = None
    """First block of each pipeline stage but the first. null means by FLOPs."""
    zero: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage over the data ranks: 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    reshard_after_forward: bool | None = None
    """With zero 3, whether gathered weights are sharded again as soon as a module has run. false keeps them until the
    step ends: less communication, but the stage's low-precision weights stay in memory. null means false under a
    pipeline, else true."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory and update the weights there (DeepSpeed's ZeRO-Offload)."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return self.pipeline * self.virtual_stages


class CheckpointConfig(Section):
    """When to save, how much to keep."""

    every: Positive = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: Positive = 3
    """Newest checkpoints kept."""
    keep_every: Positive | None = None
    """Checkpoints of steps that are a multiple of this are kept for good."""


class EvaluationConfig(Section):
    """Validation loss and benchmark tasks during training."""

    every: Positive = 500
    """Steps between validations; the last step is always validated."""
    batches: Positive = 100
    """Validate on this many × training.global_batch sequences, in file order, at most all there are."""
    tasks: list[str] = []
    """Tasks of lm-evaluation-harness to score as tools/evaluate.py --tasks does, by name."""
    tasks_every: Positive | None = None
    """Steps between scoring them, on a checkpoint that is saved for it; the last step is always scored. null means the
    last step alone."""
    tasks_data: str | None = None
    """Folder of tools/fetch_eval_data.py; what it lacks comes from Hugging Face's hub. null means data/eval, where that
    is there."""
    tasks_limit: Positive | None = None
    """Score the first so many samples of each task. null means all."""


class LoggingConfig(Section):
    """Where metrics go besides RUN/metrics.jsonl, which is always written."""

    every: Positive = 50
    """Steps between training lines."""
    wandb: bool = False
    """Log to Weights & Biases; offline, under the run folder, where no key is set."""
    tensorboard: bool = False
    """Write TensorBoard events under RUN/tensorboard."""


class Config(Section):
    """One run."""

    run: str
    """The run folder: everything a run writes is in it; an existing one of the same config is resumed."""
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
    """The class behind a section's name, None for a plain key such as run."""
    annotation = Config.model_fields[section].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
