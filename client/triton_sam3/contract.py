"""The served models as a client sees them: every name, type and shape on the wire, defined once.

    sam3_interactive      image + prompts            -> low_res_masks, iou_predictions, image_id
    sam3_prompt_decoder   image_id + prompts         -> the same (the clicks after the first)

Axes are letters: B images (always 1 here), S the encoder's input side, N objects, P tokens of the
object with the most, M the side of the mask logits, K candidate masks per object. S and M are
read from the server's model configuration, see `ServedModel.from_configs`.
"""

from dataclasses import dataclass

INTERACTIVE = "sam3_interactive"
DECODER = "sam3_prompt_decoder"
ENCODER = "sam3_image_encoder"

IMAGE_HEADER = "x-sam3-image"
"""Header on every request about an image, the same for the same pixels: a proxy in front of
several servers hashes it, so that clicks reach the server that keeps the image."""

WORK_HEADER = "x-sam3-work"
"""Header that says what a request costs, `encode` or `click`, readable without parsing a gRPC body:
a proxy limits each separately."""
ENCODE, CLICK = "encode", "click"

LABEL_NEGATIVE, LABEL_POSITIVE, LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT = 0, 1, 2, 3
LABEL_PADDING = -1
"""Values of `point_labels`, one per token; a box is two tokens, its corners."""

NOT_KEPT = "image_id not found"
"""How the decoder's error starts if it does not keep the image, or no longer does."""


@dataclass(frozen=True)
class Tensor:
    """One input or output: Triton's datatype and the letters of its axes, batch first."""

    name: str
    datatype: str
    axes: tuple[str | int, ...]


IMAGE = Tensor("image", "UINT8", ("B", "S", "S", 3))
IMAGE_ID = Tensor("image_id", "BYTES", ("B", 1))
POINT_COORDS = Tensor("point_coords", "FP32", ("B", "N", "P", 2))
POINT_LABELS = Tensor("point_labels", "INT32", ("B", "N", "P"))
MASK_INPUT = Tensor("mask_input", "FP16", ("B", "N", "M", "M"))
MULTIMASK_OUTPUT = Tensor("multimask_output", "BOOL", ("B", 1))
BEST_ONLY = Tensor("best_only", "BOOL", ("B", 1))
KEEP_IMAGE = Tensor("keep_image", "BOOL", ("B", 1))

LOW_RES_MASKS = Tensor("low_res_masks", "FP16", ("B", "N", "K", "M", "M"))
IOU_PREDICTIONS = Tensor("iou_predictions", "FP32", ("B", "N", "K"))

PROMPTS = (POINT_COORDS, POINT_LABELS, MASK_INPUT, MULTIMASK_OUTPUT, BEST_ONLY)
OUTPUTS = (LOW_RES_MASKS, IOU_PREDICTIONS, IMAGE_ID)
INTERACTIVE_INPUTS = (IMAGE, *PROMPTS, KEEP_IMAGE)

TENSORS = {tensor.name: tensor for tensor in (*INTERACTIVE_INPUTS, *OUTPUTS)}

MULTIMASK_DEFAULT = True
"""The server's default for `multimask_output`; the other flags default to false."""

MAX_OBJECTS = "max_objects"
MAX_TOKENS = "max_tokens"
"""Parameters in the decoder's configuration: most objects per request, most tokens per object."""
