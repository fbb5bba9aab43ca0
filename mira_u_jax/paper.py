"""The published figures of MIRA-U, as its tables print them.

"Confidence-Weighted Semi-Supervised Learning for Skin Lesion Segmentation Using Hybrid CNN-Transformer Networks" (Saqib
Qamar), Tables 1-5. Figures are facts, copied digit by digit; strings, because the number of digits says how far a figure
was rounded. None: the table has no such column or entry. report.py checks them, docs/paper.md discusses them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of results; figures are decimal strings in [0, 1]. cited: the paper quotes it from someone else."""

    table: int
    label: str
    dice: str
    iou: str
    accuracy: str | None = None
    precision: str | None = None
    recall: str | None = None
    cited: bool = False


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A row of Table 1. passes: Monte Carlo dropout passes; uncertainty: "uncertainty filtering", which is not defined."""

    name: str
    parameters: str
    passes: str
    uncertainty: str


TEACHERS = (
    Teacher("T1", parameters="42,156", passes="8", uncertainty="0.0985"),
    Teacher("T2", parameters="28,943", passes="12", uncertainty="0.1034"),
    Teacher("T3", parameters="51,208", passes="16", uncertainty="0.1157"),
    Teacher("T4", parameters="38,742", passes="20", uncertainty="0.0876"),
)

# Table 2 heads its last column precision and Table 5 recall: the row of 50%, batch 4 has .9013 and .9243 in both, swapped.
ROWS = (
    # ISIC-2016; share of labelled training images, 50 epochs
    Row(2, "10%, batch 4", dice="0.47975", iou="0.36712", accuracy="0.79581", recall="0.3569", precision="0.73564"),
    Row(2, "20%, batch 4", dice="0.59907", iou="0.50618", accuracy="0.80213", recall="0.4946", precision="0.76026"),
    Row(2, "30%, batch 4", dice="0.70655", iou="0.59287", accuracy="0.81380", recall="0.6492", precision="0.77445"),
    Row(2, "40%, batch 4", dice="0.81940", iou="0.72515", accuracy="0.82652", recall="0.8586", precision="0.78410"),
    Row(2, "50%, batch 8", dice="0.9075", iou="0.8515", accuracy="0.9518", recall="0.915", precision="0.9210"),
    Row(2, "50%, batch 6", dice="0.9099", iou="0.8442", accuracy="0.9429", recall="0.8999", precision="0.9109"),
    Row(2, "50%, batch 4", dice="0.9153", iou="0.8552", accuracy="0.9703", recall="0.9013", precision="0.9243"),
    # PH2, trained on 50% of ISIC-2016
    Row(3, "batch 16", dice="0.7919", iou="0.6556", accuracy="0.9291", recall="0.9822", precision="0.7491"),
    Row(3, "batch 8", dice="0.8641", iou="0.7449", accuracy="0.8923", recall="0.8732", precision="0.9097"),
    Row(3, "batch 4", dice="0.9130", iou="0.8632", accuracy="0.9384", recall="0.8691", precision="0.9208"),
    # ISIC-2016; the bracket is the paper's reference, the percentage the share of labelled training images
    Row(4, "EIU-Net [31], 100%", dice="0.919", iou="0.855", accuracy="0.959", cited=True),
    Row(4, "Ensemble [32]", dice="0.89", iou="0.85", cited=True),
    Row(4, "Rema-Net [33], 100%", dice="0.9103", iou="0.8617", accuracy="0.9638", cited=True),
    Row(4, "RA-Net [34], 100%", dice="0.9094", iou="0.8524", accuracy="0.967", cited=True),
    Row(4, "MASDF-Net [35], 100%", dice="0.9098", iou="0.8435", accuracy="0.9668", cited=True),
    Row(4, "LSCS-Net [36], 100%", dice="0.9148", iou="0.8646", accuracy="0.9644", cited=True),
    Row(4, "ResNet-50 + ViT [37], 100%", dice="0.9111", iou="0.8543", accuracy="0.9642", cited=True),
    Row(4, "UDAMT [38], 10%", dice="0.8789", iou="0.7884", accuracy="0.9573", cited=True),
    Row(4, "FixMatch [38], 50%", dice="0.7657", iou="0.6374", accuracy="0.8667", cited=True),
    Row(4, "MIRA-U, 50%", dice="0.9153", iou="0.8552", accuracy="0.9703"),
    # ISIC-2016, 50%
    Row(5, "full", dice="0.9153", iou="0.8552", accuracy="0.9703", precision="0.9013", recall="0.9243"),
    Row(5, "no uncertainty mask", dice="0.86", iou="0.79", accuracy="0.83", precision="0.85", recall="0.87"),
    Row(5, "no MIM", dice="0.84", iou="0.77", accuracy="0.81", precision="0.83", recall="0.84"),
    Row(5, "CNN-only", dice="0.85", iou="0.78", accuracy="0.82", precision="0.84", recall="0.85"),
    Row(5, "no entropy loss", dice="0.89", iou="0.82", accuracy="0.85", precision="0.86", recall="0.89"),
)
