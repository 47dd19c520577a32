"""Legend of the attribution report: what each word on the page means, for readers who are no statisticians."""

from __future__ import annotations

REPEATS_LEGEND = {
    "Repeats": "How often an epoch of training saw the image, as the data set states it. Methods that estimate what "
    "removing an image does (influence functions, TRAK) score it with all its copies, and their p-values are of one "
    "copy; a loss increase is the same for each copy."
}
LEGEND = {
    "Rank": "Place among all training images that were scored; 1 is the most influential.",
    "Score": "What the method measured for this training and this generated image; higher is more influential. "
    "Where zero lies depends on the method, and scores compare within one generated image, not between two.",
    "Parts": "The same scores from some timesteps of the diffusion alone (low ones decide details, high ones the "
    "layout), or from one caption of each training image alone, where they were asked for.",
    "p-value": "How often an image that the model was never trained on scores at least as high for the same generated "
    "image. It holds for one image at a time: of 1,000 images without any influence, about 10 have p ≤ 0.01.",
    "Family-wise p": "How likely it is that at least one of all training images would score as high as the first does "
    "if none had any influence. Small (below 0.05): the first stands out.",
    "Influence": "Estimate of the score that the slow method would give, from which the fast method learned. The "
    "interval holds that score as often as was asked for when the estimate was calibrated.",
    "Shares": "A group's part of the positive influence (score above the median of all training images) of the "
    "highest-ranked images. Bar: the share. Line with two ends: its interval, from drawing the training images "
    "anew. Tick: the group's share of the training images, where a method that knows nothing would put the bar.",
    "Reliability": "Split-half reliability: how well the order would agree with that of a second measurement with "
    "other noise samples. 1 is perfect; below 0.8 the order is noisy.",
    "Relative loss increase": "How far the model was moved to unlearn the generated image: by how much its loss "
    "increased, relative to the loss before; 100 % is twice. Moved too little, the scores are mostly noise.",
    "Effective number of images": "With as many equally influential images the influence would be as concentrated: a "
    "small number says that few images hold most of it.",
    "Licence": "As the data set states it, next to the image that it belongs to. Large images are shown reduced.",
    "Not claimed": "A high rank does not say that the image was copied, that the generated image would differ "
    "without it, or who owns what. Scores need not add up over images. Only training again without the images "
    "proves their influence.",
}
OF_A_NULL = ("p-value", "Family-wise p")  # entries that mean nothing where there is no null
