"""Plain words of radiology reports that are also names or look like misspelt ones.

A word here is not replaced as a misspelt name, and as an exact name only where it is written as one.
"""

_WORDS = """
    able above abnormal abnormality acute adjacent again air airspace airway allowing also although
    angle angles anterior aorta aortic apex apical apices appear appearance appears area areas artery
    aspect assess atelectasis atherosclerotic azygos base bases basal basilar below bibasilar bilateral
    blunting body bone bones bony border borderline both bowel bronchial bronchovascular burden
    calcification calcified carina cardiac cardiomediastinal cardiomegaly catheter cath cavitary central
    change changes chest chronic clavicle clear clearly clinical colon compared comparison complete
    concern congestion consistent consolidation contour contours correlate costophrenic cough course
    crowding current degenerative demonstrate demonstrated density deformity device diaphragm diffuse
    disease distal distended dome dyspnea edema effusion effusions elevated elevation emphysema
    endotracheal enlarged enlargement evidence evaluation exam examination fever field fields film
    findings fissure fluid focal focus follow followup fracture fractures free frontal gastric given
    good granuloma granulomatous gray great green ground hard hardware heart hemidiaphragm hemithorax
    hernia hiatal high hila hilar hill hyperexpanded hyperinflated hyperinflation hypoinflation
    identified image images impression increased indication inferior infiltrate infiltrates inspiration
    interstitial intact internal interval jugular knob large lateral leads left level line linear lines
    little lobe lobes long lower lucency lung lungs mark marker marking markings marks mass masses
    material may mediastinal mediastinum medial mid middle mild mildly minimal moderate multiple
    nasogastric nodular nodule nodules none normal noted obscured opacities opacity osseous overlying
    pacemaker pain park parenchymal partially patchy patient patients perihilar peripheral persistent
    picc place placement plate pleural pneumonia pneumothorax poor portable position possible posterior
    present prior probable probably process prominence prominent projects pulmonary quality radiograph
    radiographs rail region related remain remains residual reticular rib ribs rice right rose round
    scar scarring scattered sclerosis scoliosis screw see seen severe shadow shadows short shoulder
    sharp side sign significant silhouette similar size sized small soft sound spine spinal stable
    status stent sternal sternotomy stomach streaky structures study subsegmental subtle suggest
    suggesting suggestion superior surgical suture symptoms technique there thickening thin thoracic
    thorax tip tissue tissues tortuous trachea tracheal trauma tube tubes unchanged under unremarkable
    upper vascular vascularity vasculature vein venous vertebral view views visible visualized volume
    volumes wall walls weak well white widened wires within without wood wound wright year years young
    zone zones with this that from have been were they them than then when what which while these those
    some such into over only other more most many much near
    """

PROTECTED = frozenset(_WORDS.split())
