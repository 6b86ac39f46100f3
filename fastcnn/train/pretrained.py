"""Training that begins from torchvision's pretrained weights."""

from torch import nn

from fastcnn.console.errors import UserError
from fastcnn.console.models import check_same_architecture, pretrained_classifier


def load_pretrained(model: nn.Module, name: str, weights: str, progress: bool = True) -> str:
    """Load torchvision's weights into a network, except a last layer of another number of classes; say what was loaded.

    Args:
        model: the network; where it scores another number of classes, its last linear layer stays as it is.
        name: its name.
        weights: a member of torchvision's weights of it.
        progress: show the progress of a download.

    Raises:
        UserError: as :func:`pretrained_classifier`, or the network was built with options that change its layers.

    Example:
        >>> load_pretrained(fastcnn.alexnet(num_classes=5), "alexnet", "DEFAULT")  # doctest: +SKIP
        'weights: AlexNet_Weights.IMAGENET1K_V1; classifier.6 starts anew, for 5 classes instead of 1000'
    """
    chosen, pretrained = pretrained_classifier(name, weights, progress)
    own = model.state_dict()
    head, layer = [item for item in model.named_modules() if isinstance(item[1], nn.Linear)][-1]
    classes = len(chosen.meta["categories"])
    starts_anew = layer.out_features != classes
    # Older weights lack the batch counters of batch normalization.
    stays = [key for key in own if key.endswith("num_batches_tracked") or (starts_anew and key.startswith(f"{head}."))]
    state = {key: own[key] for key in stays}
    state |= {key: value for key, value in pretrained.items() if not (starts_anew and key.startswith(f"{head}."))}
    try:
        check_same_architecture(name, state, own)
    except UserError as error:
        raise UserError(f"--weights {weights}: {error}") from error
    model.load_state_dict(state)
    if starts_anew:
        return f"weights: {chosen!r}; {head} starts anew, for {layer.out_features} classes instead of {classes}"
    return f"weights: {chosen!r}; {head} is kept: the data are taken to have its {classes} classes"
