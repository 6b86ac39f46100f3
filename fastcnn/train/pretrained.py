"""Training that begins from torchvision's pretrained weights."""

from torch import nn

from fastcnn.console.errors import UserError
from fastcnn.console.models import check_same_architecture, pretrained_classifier


def load_pretrained(model: nn.Module, name: str, weights: str, progress: bool = True) -> str:
    """Load torchvision's weights into a network, except a last layer of another number of classes; say what was loaded.

    ``progress`` shows that of a download. Raises :class:`UserError` as :func:`pretrained_classifier`, or where the
    network was built with options that change its layers.
    """
    chosen, pretrained = pretrained_classifier(name, weights, progress)
    own = model.state_dict()
    head, layer = [item for item in model.named_modules() if isinstance(item[1], nn.Linear)][-1]
    classes = len(chosen.meta["categories"])
    starts_anew = layer.out_features != classes
    if starts_anew:
        pretrained |= {f"{head}.{key}": value for key, value in layer.state_dict().items()}
    # Older weights lack the batch counters of batch normalization.
    state = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | pretrained
    try:
        check_same_architecture(name, state, own)
    except UserError as error:
        raise UserError(f"--weights {weights}: {error}") from error
    model.load_state_dict(state)
    if starts_anew:
        return f"weights: {chosen!r}; {head} starts anew, for {layer.out_features} classes instead of {classes}"
    return f"weights: {chosen!r}; {head} is kept: the data are taken to have its {classes} classes"
