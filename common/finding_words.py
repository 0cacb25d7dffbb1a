"""Words of findings in English chest reports, as regular expressions over lower-case text without hyphens.

Two vocabularies: CheXpert's 13 observations ("No Finding" follows from them) and the 14 of ChestX-ray14, by
which the NegBio authors labelled Open-i. They are FedRad's own wording of what the labels' names mean;
`labeller.py` judges negation and doubt.
"""

from __future__ import annotations

_HEART = (
    r"(?:heart(?: size| shadow)?|cardiac (?:silhouette|shadow|contours?|size)|"
    r"cardiac and mediastinal silhouettes?)"
)
_BIG = r"(?:enlarged|enlargement|large|big|prominent|increased|globular)"
_DEGREE = (
    r"(?:(?:is|are|appears?|remains?|shows?|size|was|to be|at|again|not|no longer|mildly|slightly|"
    r"moderately|markedly|severely|persistently|borderline|top|mild|moderate|severe|marked|stably|stable|"
    r"minimally|grossly|the|in|size|and|but|overall|significantly|definitely),? )"
)
CHEXPERT_WORDS: dict[str, str] = {
    "Enlarged Cardiomediastinum": (
        r"widen(?:ed|ing) (?:of the )?(?:superior |upper )?mediastin\w+|mediastin\w+ (?:is |"
        r"appears )?(?:not )?"
        r"(?:mildly |slightly )?widen(?:ed|ing)|mediastinal (?:widening|enlargement)|"
        r"enlarged (?:cardio)?mediastin\w+|"
        r"cardiomediastinal silhouette (?:is |appears |remains )?(?:not )?(?:mildly |moderately )?enlarged"
    ),
    "Cardiomegaly": (
        rf"cardiomegaly|cardiac enlargement|{_HEART} {_DEGREE}{{0,6}}{_BIG}\b|"
        rf"(?:enlarged|enlargement of|large|increased) (?:of )?(?:the )?{_HEART}|enlarged (?:heart|cardiac)|"
        r"(?:left |right )?ventricular (?:enlargement|prominence)"
    ),
    "Lung Opacity": (
        r"opaci(?:ty|ties|fication|fications|fied)|infiltrat(?:e|es|ion|ions)|air ?-?space (?:disease|"
        r"process)\w*|"
        r"(?:hazy|patchy|streaky|interstitial|reticular|nodular|focal) (?:\w+ )?(?:densit(?:y|ies)|markings)|"
        r"interstitial (?:prominence|thickening|disease)|(?:basilar|basal|lobe|lung) densit(?:y|ies)"
    ),
    "Lung Lesion": (
        r"nodul(?:e|es)|fibronodular|nodular (?:\w+ )?(?:opacit(?:y|ies)|densit(?:y|ies)|lesions?|focus|"
        r"foci)|"
        r"(?:lung|pulmonary|cavitary|parenchymal|lobe) lesions?|mass(?:es)?|mass ?-?like|tumou?rs?|"
        r"neoplas\w+|"
        r"metasta\w+|malignan\w+"
    ),
    "Edema": r"(?:o?edema)|(?:heart failure|\bchf)|(?:pulmonary )?vascular congestion with edema",
    "Consolidation": r"consolidat(?:ion|ions|ed|ive)",
    "Pneumonia": r"(?:broncho)?pneumonias?|pneumoni(?:c|tis)|infectious (?:process|infiltrates?)",
    "Atelectasis": (
        r"atelecta\w+|(?:lobe|lobar|lung|segmental) collapse|collapse of the (?:\w+ ){0,4}(?:lobes?|"
        r"lung)|collapsed lung"
    ),
    "Pneumothorax": r"(?:hydro)?pneumothora(?:x|ces|cis|xes)",
    "Pleural Effusion": (
        r"(?<!pericardial )(?<!joint )effusions?|pleural fluid|(?:hydro|hemo)thorax|"
        r"fluid in the (?:\w+ )?pleural spaces?"
    ),
    "Pleural Other": (
        r"pleural (?:\w+ )?(?:thickening|scar\w*|plaques?|calcification|fibrosis)|"
        r"pleural ?(?:and )?(?:parenchymal)? scarring|apical (?:\w+ )?(?:cap|capping|thickening)|"
        r"thickening of the (?:\w+ )?pleura|fibrothorax"
    ),
    "Fracture": r"fractur(?:e|es|ed)",
    "Support Devices": (
        r"pacemakers?|pacing (?:device|leads?|wires?)|pacer|defibrillator|\baicd|\bicd|picc|port-?a-?cath|"
        r"mediport|"
        r"(?:infusion|chest|chemo) ports?|catheters?|(?:central|jugular|subclavian|"
        r"venous) (?:venous )?lines?|"
        r"(?:endotracheal|tracheostomy|nasogastric|orogastric|enteric|feeding|chest|thoracostomy|\bet|"
        r"\bng|\bog) "
        r"tubes?|support devices?|stents?|(?:sternotomy|sternal|epicardial|median sternotomy) wires?|"
        r"(?:surgical|vascular) clips?|prosthe(?:sis|tic valve)|valve replacement|balloon pump"
    ),
}

# "Nodular density" is indexed as a density, a hiatal hernia as a hernia, soft-tissue swelling as neither.
CHEST14_WORDS: dict[str, str] = {
    "Atelectasis": CHEXPERT_WORDS["Atelectasis"],
    "Cardiomegaly": CHEXPERT_WORDS["Cardiomegaly"],
    "Effusion": CHEXPERT_WORDS["Pleural Effusion"],
    "Infiltration": r"infiltrat(?:e|es|ion|ions|ive)",
    "Mass": r"mass(?:es)?|mass ?like",
    "Nodule": r"(?:micro)?nodul(?:e|es)",
    "Pneumonia": CHEXPERT_WORDS["Pneumonia"],
    "Pneumothorax": CHEXPERT_WORDS["Pneumothorax"],
    "Consolidation": CHEXPERT_WORDS["Consolidation"],
    "Edema": r"(?<!soft tissue )(?<!subcutaneous )o?edema",
    "Emphysema": r"(?<!subcutaneous )(?<!cutaneous )(?<!soft tissue )emphysema\w*",
    "Fibrosis": r"(?<!cystic )(?:fibrosis|fibrotic)",
    "Pleural Thickening": (
        r"(?:pleural|fissural) (?:\w+ )?thickening|thickening of the (?:\w+ )?(?:pleura|fissures?)|"
        r"thickened (?:pleura|fissure)"
    ),
    "Hernia": r"(?<!umbilical )(?<!inguinal )(?<!ventral )(?:hernias?|herniation)",
}
