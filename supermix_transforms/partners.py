"""Partners that are easy to mix, and varied: an assignment over a batch's class maps.

No teacher call is made; docs/solver-log.md has the trials behind score and constants.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from supermix_transforms.draws import Draw, Purpose, generator
from supermix_transforms.results import ClassMaps
from supermix_transforms.solver import margins

__all__ = ["TURNS", "has_turn", "match_partners"]

TURNS = 3  # epochs in which each picture is a partner at least once
SIMILAR_COSINE = 0.15  # of two classes' rows of the classifier, centred; pairs above are avoided
BALANCES = (-1.0, -0.5, 0.0, 0.5, 1.0)  # thresholds of a partition, in standard deviations
CROSS_LOGITS = 0.5  # weight of what each picture as a whole says for the other's class
OWN_MARGINS = 0.25  # weight of how sure the teacher is of each picture unmixed
CHANCE = 0.5  # in logits; of pairs whose scores are as near as that, chance decides
RIVALS = 4  # classes of each picture that its mixes may be taken for, its own among them

# What a pair costs, in logits: each step outweighs all that stand before it.
LARGE_SCORE = 100.0  # bound of a score
SIMILAR, TURN, SAME_CLASS, SAME_PICTURE = 1e3, 1e5, 1e8, 1e12


def match_partners(maps: ClassMaps, classes: Tensor, k: int, draw: Draw, *, cap: int = 2) -> Tensor:
    """Tuples that are easy to mix, read from the class maps without a teacher call, (B, k) int64.

    Every cell of a pair is given to the picture that says more for the pair's two classes, at
    several balances between the two; the best margin of the two classes in such a mix, and what
    each picture as a whole says for both classes, are the pair's score. An assignment gives each
    picture a partner (for k > 2 one after the other, by the sum of its scores). For variety,
    classes that are alike to the teacher (cosine of their rows of the classifier) are kept apart
    where the batch allows it, none is a partner more than `cap` times in each of the k - 1 places,
    and whoever `has_turn` is a partner at least once; with a cap of 1 everybody is, in each place.

    The same samples in another order have the same partners.

    Args:
        maps: class maps of the B pictures.
        classes: the teacher's, (B,) int64.
        k: images a tuple, at most B.
        draw: seed, epoch and the B identities; they say whose turn it is, and decide where scores
            are close.
        cap: how often a picture may be a partner in each of the k - 1 places, at least 1; more
            only where k is so near to B that others are used up.

    Returns:
        Rows of the batch; row i starts with i.

    Raises:
        ValueError: for k larger than B, cap less than 1, or a draw of another number of samples.
    """
    count = len(classes)
    if k > count:
        raise ValueError(
            f"k: expected at most {count}, a batch's pictures, got {k}. Pass a larger batch."
        )
    if cap < 1:
        raise ValueError(f"cap: expected at least 1 use of each picture, got {cap}.")
    if len(draw.ids) != count:
        raise ValueError(
            f"draw: expected the identities of {count} pictures, got {len(draw.ids)}. Pass those "
            "of the batch that the class maps are of."
        )
    # Rows in an order of the samples' own: sums and ties then do not depend on the batch's.
    order = torch.tensor(draw.order(Purpose.ORDER))
    place = order.to(classes.device)
    with torch.no_grad(), torch.autocast(classes.device.type, enabled=False):
        features, weight, bias = (tensor.float() for tensor in maps)
        scores = _pair_scores(features[place], weight, bias, classes[place])
        similar = _similar(weight, classes[place])
    # infinite where a pair holds all classes there are, NaN where the teacher's answer is
    scores = scores.cpu().double()  # of which MPS has none
    scores = scores.nan_to_num(nan=-LARGE_SCORE).clamp(-LARGE_SCORE, LARGE_SCORE)
    same = (classes[:, None] == classes[None, :])[place][:, place].cpu()
    chance = generator(draw, draw.ids[order].tolist(), Purpose.CHANCE).random((count, count))
    scores = scores - SIMILAR * similar.cpu() + CHANCE * torch.from_numpy(chance)
    sources = _assign(scores, same, has_turn(draw)[order], k, cap)
    return order[sources][order.argsort()].to(classes.device)


def has_turn(draw: Draw) -> Tensor:
    """Who must be a partner in this epoch, (B,) bool: each sample in one of `TURNS` epochs."""
    still = draw._replace(epoch=0, attempt=0)
    phases = [still.digest(Purpose.TURN, i) for i in draw.ids.tolist()]
    return torch.tensor([(phase + draw.epoch) % TURNS == 0 for phase in phases])


def _assign(scores: Tensor, same: Tensor, turn: Tensor, k: int, cap: int) -> Tensor:
    """Tuples (B, k) by scores (B, B), `same` classes (B, B) and whose `turn` (B,) it is."""
    from scipy.optimize import linear_sum_assignment

    count = len(scores)
    sources = torch.arange(count)[:, None]
    barred = torch.eye(count, dtype=torch.bool)
    waiting = turn.clone()
    for _ in range(1, k):
        total = scores[sources].sum(dim=1)  # (B, B): candidate j for the tuple of i
        # a class twice in a tuple is a last resort, the same picture twice is none
        total = total - SAME_CLASS * same[sources].any(dim=1) - SAME_PICTURE * barred
        for copies in range(cap, cap + count):
            columns = total.repeat(1, copies)  # each picture as often as it may be used
            columns[:, :count] += TURN * waiting
            _, chosen = linear_sum_assignment(columns.numpy(), maximize=True)
            partner = torch.from_numpy(chosen) % count
            if not barred.gather(1, partner[:, None]).any():
                break
        sources = torch.cat([sources, partner[:, None]], dim=1)
        barred = barred.scatter(1, partner[:, None], True)
        waiting[partner] = False
    return sources


def _similar(weight: Tensor, classes: Tensor) -> Tensor:
    """The pairs of classes that are alike to the teacher, (B, B) bool."""
    rows = F.normalize(weight - weight.mean(dim=0), dim=1)[classes]
    return rows @ rows.T > SIMILAR_COSINE


def _pair_scores(features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> Tensor:
    """How easily each pair mixes, in logits: features (B, D, h, w) -> (B, B), symmetric."""
    features = features.flatten(2)  # (B, D, hw)
    count, _, cells = features.shape
    logits = features.mean(dim=2) @ weight.T + bias  # (B, N)
    rivals = logits.topk(min(RIVALS, len(bias)), dim=1).indices  # (B, R)
    # only classes that come first for some picture: N may be large
    used, index = torch.cat([classes[:, None], rivals], dim=1).unique(return_inverse=True)
    own, rivals = index[:, 0], index[:, 1:]
    bias = bias[used]
    shares = torch.einsum("nd,bdu->bnu", weight[used], features) / cells  # (B, n, hw)

    cross = shares[:, own]  # (i, j, hw): A_i[y_j]
    says = cross.diagonal(dim1=0, dim2=1).T[:, None] + cross  # A_i[y_i] + A_i[y_j]
    lead = says - says.transpose(0, 1)  # of i over j in each cell, (i, j, hw)
    spread = lead.std(dim=2, correction=0, keepdim=True)
    whole = cross.sum(dim=2) + bias[own]  # (i, j): logit of y_j for picture i
    sure = margins(logits, F.one_hot(classes, logits.shape[1]).bool()).nan_to_num(posinf=0.0)
    balances = torch.tensor(BALANCES, device=lead.device)[:, None]
    scores = CROSS_LOGITS * (whole + whole.T) + OWN_MARGINS * (sure[:, None] + sure)
    everyone = torch.arange(count, device=lead.device)
    for i in range(count - 1):
        j = everyone[i + 1 :]  # the other half of the table is the same
        mine = (lead[i, j, None] >= balances * spread[i, j, None]).float()  # (J, T, hw)
        asked = torch.cat(  # classes whose logits are wanted, (J, 2 + 2R)
            [own[i].expand(len(j), 1), own[j, None], rivals[i].expand(len(j), -1), rivals[j]], dim=1
        )
        ours, theirs = shares[i][asked], shares[j[:, None], asked]  # (J, 2 + 2R, hw)
        mixed = mine @ (ours - theirs).transpose(1, 2) + theirs.sum(dim=2)[:, None]
        mixed = mixed + bias[asked][:, None]  # (J, T, 2 + 2R)
        members = (asked == own[i]) | (asked == own[j, None])
        others = mixed.masked_fill(members[:, None], -torch.inf).amax(dim=2)
        margin = (mixed[:, :, :2].amin(dim=2) - others).amax(dim=1)
        scores[i, j] += margin
        scores[j, i] += margin
    return scores
