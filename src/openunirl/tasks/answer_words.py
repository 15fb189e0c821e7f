"""The words the answer matcher knows: names of things, colours, numbers, and the small words of English grammar.

    (nothing) -> ALIASES, COLOR_ALIASES, NUMBERS, ...   (tables)
    name      -> plurals(name), singulars(name)         (regular, irregular and GenEval's own forms)

Source: GenEval's 80 object and 10 colour names (Ghosh et al. 2023); every alias is ours.
An alias is a spelling, a synonym, or a short form that names one class only ("phone", "bat"). A word that fits several
classes ("bag", "glass") is a HYPERNYM instead: no rule can settle what it means.
"""

from __future__ import annotations


def word_set(text: str) -> frozenset[str]:
    """The words of a line. Example: word_set("on in") -> frozenset({"on", "in"})"""
    return frozenset(text.split())


_PEOPLE = (
    "people,man,men,woman,women,boy,girl,child,children,kid,baby,babies,toddler,lady,ladies,guy,gentleman,gentlemen,"
    "human,human being,adult,teenager,pedestrian,player,baseball player,tennis player,surfer,skier,snowboarder,"
    "skateboarder,cyclist,rider,chef,worker,farmer,somebody,someone,male,female"
)

ALIASES: dict[str, str] = {
    "person": _PEOPLE,
    "bicycle": "bike,push bike,pushbike,pedal bike",
    "car": "automobile,motor car,motorcar,sports car,race car,racing car,passenger car",
    "motorcycle": "motorbike,motor bike,motor cycle",
    "airplane": "plane,aeroplane,air plane,airliner,jetliner,passenger jet,jet plane,jet airplane",
    "bus": "busses,school bus,double decker,autobus",
    "train": "railway train,locomotive",
    "truck": "lorry,pickup truck,pick up truck,pickup",
    "boat": "sailboat,sail boat,rowboat,row boat,rowing boat,motorboat,motor boat,speedboat,sailing boat",
    "traffic light": "traffic signal,stoplight,stop light,traffic signal light,traffic lamp",
    "fire hydrant": "hydrant,fireplug,fire plug",
    "stop sign": "stopsign,stop signal sign",
    "parking meter": "meter,parkingmeter,parking metre",
    "bench": "park bench,wooden bench",
    "bird": "birdie",
    "cat": "kitten,kitty,house cat,housecat,pussycat",
    "dog": "puppy,pup,doggy,doggie",
    "horse": "pony",
    "sheep": "lamb,ewe",
    "cow": "cattle",
    "elephant": "",
    "bear": "polar bear,grizzly bear,grizzly",
    "zebra": "",
    "giraffe": "",
    "backpack": "back pack,rucksack,knapsack",
    "umbrella": "parasol,brolly",
    "handbag": "hand bag,purse,pocketbook",
    "tie": "necktie,neck tie,bow tie,bowtie",
    "suitcase": "suit case",
    "frisbee": "frisbee disc,frisbee disk,flying disc,flying disk",
    "skis": "ski,pair of skis,pairs of skis,set of skis",
    "snowboard": "snow board",
    "sports ball": (
        "ball,sport ball,sportsball,soccer ball,football,basketball,volleyball,baseball,baseball ball,tennis ball,"
        "beach ball,rugby ball,golf ball,bowling ball,basket ball,volley ball,american football"
    ),
    "kite": "",
    "baseball bat": "bat",
    "baseball glove": "glove,mitt,baseball mitt,catcher mitt",
    "skateboard": "skate board",
    "surfboard": "surf board,surfing board",
    "tennis racket": "racket,racquet,tennis racquet",
    "bottle": "water bottle,wine bottle,beer bottle",
    "wine glass": "wineglass,glass of wine,glass of red wine,glass of white wine,glasses of wine,wine goblet",
    "cup": "mug,teacup,tea cup,coffee cup,coffee mug,tea mug",
    "fork": "",
    "knife": "",
    "spoon": "teaspoon,tablespoon",
    "bowl": "",
    "banana": "",
    "apple": "",
    "sandwich": "",
    "orange": "orange fruit",
    "broccoli": "brocoli,brocolli,broccolli,broccoli floret,floret of broccoli,head of broccoli",
    "carrot": "",
    "hot dog": "hotdog",
    "pizza": "pizza pie",
    "donut": "doughnut",
    "cake": "birthday cake,layer cake,chocolate cake,cheesecake",
    "chair": "armchair,arm chair",
    "couch": "sofa,settee,loveseat,love seat,sofa couch",
    "potted plant": "plant,houseplant,house plant,pot plant,indoor plant,plant in a pot,plants in pots,plant pot",
    "bed": "",
    "dining table": "table,dinner table,kitchen table,diningtable,dining room table,dining desk",
    "toilet": "toilet bowl,toilet seat,lavatory,commode",
    "tv": "television,tv set,television set,tv screen,television screen,telly,flat screen tv,flat screen,flatscreen",
    "laptop": "laptop computer,notebook computer,portable computer,macbook",
    "computer mouse": "mouse,mice,computer mice,wireless mouse",
    "tv remote": (
        "remote,remote control,tv remote control,television remote,television remote control,remote controller,"
        "tv remote controller,tv control,remote control for a tv,remote control for the tv,remote control device"
    ),
    "computer keyboard": "keyboard,computer key board,key board",
    "cell phone": "cellphone,phone,mobile phone,mobile,smartphone,smart phone,iphone,cellular phone,cell",
    "microwave": "microwave oven",
    "oven": "",
    "toaster": "",
    "sink": "washbasin,wash basin,basin,washbowl",
    "refrigerator": "fridge,refrigerater,frig",
    "book": "",
    "clock": "timepiece",
    "vase": "flower vase",
    "scissors": "scissor,pair of scissors,pairs of scissors,set of scissors",
    "teddy bear": "teddy,teddybear,stuffed bear,plush bear,toy bear,stuffed teddy bear,bear plush,bear toy",
    "hair drier": "hair dryer,hairdryer,hairdrier,blow dryer,blow drier,blowdryer,dryer,drier",
    "toothbrush": "tooth brush",
}
"""GenEval's class -> its other names, singular unless irregular, comma separated. Plurals are made by `plurals`."""

OTHER_ALIASES: dict[str, str] = {
    "rabbit": "bunny",
    "pig": "piglet,hog",
    "axe": "ax",
    "bathtub": "bath tub,tub",
    "saxophone": "sax",
    "bucket": "pail",
    "teapot": "tea pot",
    "lighthouse": "light house",
    "watermelon": "water melon",
    "padlock": "pad lock",
    "wheelbarrow": "wheel barrow",
    "screwdriver": "screw driver",
}
"""Further training names (tasks/geneval.py, OTHER_OBJECTS) that have another name."""

COMMON_OBJECTS = (
    "tree,apple tree,orange tree,flower,rose,plate,dish,saucer,tray,house,doghouse,dog house,birdhouse,bird house,"
    "birdcage,bird cage,cage,building,tower,clock tower,bridge,statue,fence,street sign,pole,fountain,mailbox,"
    "phone booth,street light,streetlight,streetlamp,desk,stool,cabinet,cupboard,shelf,bookshelf,book shelf,bookcase,"
    "dresser,drawer,wardrobe,nightstand,curtain,carpet,rug,blanket,pan,pot,kettle,jar,box,can opener,napkin,"
    "chopsticks,"
    "stove,dishwasher,washing machine,blender,fan,printer,tablet,telephone,headphones,"
    "speaker,radio,charger,pen,paper,newspaper,magazine,watch,wristwatch,necklace,bracelet,sunglasses,"
    "shirt,dress,coat,boot,scarf,belt,wallet,briefcase,tram,subway,scooter,wagon,cart,cable car,"
    "wheel,seahorse,rocking horse,fox,wolf,deer,fish,whale,seal,bee,butterfly,spider,ant,snake,lizard,rat,"
    "hamster,panda,koala,gorilla,ape,"
    "leopard,cheetah,rhino,rhinoceros,hippo,hippopotamus,donkey,moose,llama,alpaca,dinosaur,dragon,grape,strawberry,"
    "cherry,pineapple,mango,tomato,potato,lettuce,cabbage,corn,bread,banana bread,toast,bagel,muffin,"
    "cookie,pancake,waffle,pie,apple pie,pasta,salad,soup,fries,cheese,ice cream,apple juice,"
    "orange juice,toilet paper,toilet brush,toothpaste,soap,hairbrush,hair brush,comb,cup holder,tv stand,bus stop,"
    "toy,doll,puppet,trampoline,tennis court,baseball field,soccer field,football field,traffic cone,cactus,"
    "keyboard piano"
)
"""Things outside GenEval's 80 that answers name; an answer that names one of them names something else."""

IRREGULAR_PLURALS = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "knife": "knives",
    "scarf": "scarves",
    "wolf": "wolves",
    "shelf": "shelves",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "skis": "skis",
    "scissors": "scissors",
    "broccoli": "broccoli",
    "cactus": "cacti",
}

HYPERNYMS: dict[str, str] = {
    "bag": "backpack,handbag,suitcase",
    "luggage": "backpack,handbag,suitcase",
    "baggage": "backpack,handbag,suitcase",
    "glass": "wine glass,cup,bottle,vase",
    "board": "snowboard,skateboard,surfboard",
    "drink": "cup,bottle,wine glass",
    "animal": "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe",
    "mammal": "cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe",
    "creature": "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe",
    "pet": "bird,cat,dog",
    "livestock": "horse,sheep,cow",
    "vehicle": "bicycle,car,motorcycle,airplane,bus,train,truck,boat",
    "aircraft": "airplane",
    "jet": "airplane",
    "fruit": "banana,apple,orange",
    "vegetable": "broccoli,carrot",
    "food": "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake",
    "dessert": "donut,cake",
    "pastry": "donut,cake",
    "furniture": "chair,couch,bed,dining table,bench",
    "seat": "chair,couch,bench",
    "appliance": "microwave,oven,toaster,refrigerator,hair drier,tv",
    "utensil": "fork,knife,spoon",
    "cutlery": "fork,knife,spoon",
    "silverware": "fork,knife,spoon",
    "container": "bottle,cup,bowl,vase,suitcase",
    "device": "tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,hair drier,clock",
    "gadget": "tv,laptop,computer mouse,tv remote,computer keyboard,cell phone",
    "screen": "tv,laptop,cell phone",
    "controller": "tv remote",
    "plush": "teddy bear",
    "plushie": "teddy bear",
    "stuffed animal": "teddy bear",
    "stuffed toy": "teddy bear",
    "plush toy": "teddy bear",
    "signal": "traffic light,stop sign",
    "sign": "stop sign",
    "computer": "laptop,computer mouse,computer keyboard",
    "desktop computer": "computer mouse,computer keyboard",
    "monitor": "tv,laptop",
    "notebook": "book,laptop",
    "ship,canoe,kayak,yacht,ferry": "boat",
    "van,taxi,jeep,suv": "car,truck",
    "bird of prey,duck,goose,penguin,owl,parrot,pigeon,seagull,eagle,swan,peacock,chicken,rooster": "bird",
    "bull,ox,calf,buffalo": "cow",
    "burger,hamburger,cheeseburger": "sandwich",
    "cupcake": "cake",
}
"""A word (or several, comma separated) that fits several classes, or only a kind of one -> the classes it may mean."""

SCENERY = word_set(
    "background backdrop wall floor ground grass lawn field meadow sky cloud clouds street road sidewalk pavement room "
    "kitchen bathroom bedroom office park beach sand snow water sea ocean lake river forest hill mountain surface "
    "countertop counter court stadium garden yard city sunset sunlight shadow"
)
"""Where things are: never one of the items of an answer."""

# -------------------------------------------------------------------------------------------- colours

COLOR_ALIASES: dict[str, str] = {
    "red": "red,scarlet,crimson,cherry red,wine red,rose red,fire engine red,ruby red,blood red,brick red,apple red",
    "orange": "orange,carrot orange,pumpkin orange",
    "yellow": "yellow,lemon yellow,banana yellow",
    "green": "green,lime green,forest green,grass green,olive green,mint green,apple green,emerald green,sea green",
    "blue": "blue,navy,navy blue,sky blue,baby blue,ocean blue,midnight blue,royal blue,cobalt blue,sea blue",
    "purple": "purple,violet",
    "pink": "pink,hot pink,rose pink,baby pink",
    "brown": "brown,chocolate brown,coffee brown",
    "black": "black,jet black",
    "white": "white,snow white",
    "gray": "gray,grey",
    "silver": "silver",
    "beige": "beige",
    "teal": "teal",
}
"""Colour -> the words that name it. The last four are no GenEval colours, yet no shade of one either."""

BOUNDARY_COLORS: dict[str, str] = {
    "turquoise": "blue,green",
    "cyan": "blue,green",
    "aqua": "blue,green",
    "indigo": "blue,purple",
    "gold": "yellow,orange,brown",
    "golden": "yellow,orange,brown",
    "amber": "yellow,orange",
    "mustard": "yellow,brown",
    "blond": "yellow",
    "blonde": "yellow",
    "tan": "brown",
    "khaki": "brown,green",
    "bronze": "brown,orange",
    "copper": "brown,orange",
    "rust": "brown,orange,red",
    "maroon": "red,brown,purple",
    "burgundy": "red,brown,purple",
    "magenta": "pink,purple,red",
    "fuchsia": "pink,purple",
    "lavender": "purple",
    "lilac": "purple,pink",
    "mauve": "purple,pink",
    "plum": "purple",
    "salmon": "pink,orange",
    "coral": "pink,orange,red",
    "peach": "pink,orange",
    "cream": "white,yellow",
    "ivory": "white",
    "off white": "white",
    "charcoal": "black",
    "ebony": "black",
    "ruby": "red",
    "emerald": "green",
    "lime": "green,yellow",
    "olive": "green",
    "azure": "blue",
    "cobalt": "blue",
    "reddish": "red",
    "orangish": "orange",
    "yellowish": "yellow",
    "greenish": "green",
    "bluish": "blue",
    "purplish": "purple",
    "pinkish": "pink",
    "brownish": "brown",
    "blackish": "black",
    "whitish": "white",
}
"""A colour between others -> the colours a judge might call it."""

SHADES = word_set("light dark bright deep pale vivid rich soft pastel neon vibrant solid shiny glossy matte")
HEDGES = word_set(
    "mostly mainly primarily predominantly largely partly partially accents accent stripes striped spots spotted "
    "details trim patches pattern markings dots highlights stripe"
)
"""Words that make one of several colours the main one."""
COMPARISONS = word_set("like same similar matching wooden wood metallic metal brick natural")
"""Words that describe a colour by a thing or a material."""

# ---------------------------------------------------------------------------------- numbers and grammar

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
TENS = {word: 10 * n for n, word in enumerate(_TENS.split(), start=2)}
NUMBERS = {w: n for n, w in enumerate(_UNITS.split())} | TENS | {"single": 1, "dozen": 12, "hundred": 100}
GROUP_NUMBERS = {"pair": 2, "couple": 2, "duo": 2, "twosome": 2, "trio": 3, "quartet": 4, "quartette": 4, "quintet": 5}
PAIRED = frozenset({"scissors", "skis"})
"""Classes of which "a pair" is one."""

DETERMINERS = word_set("a an the this that these those some its their his her my your our another each every")
COPULAS = word_set(
    "is are was were be being been sits stands lies rests hangs floats appears seems looks sit stand lie rest hang "
    "contains shows has have"
)
LOCATIVES = word_set("on in at inside atop against within upon onto")
OTHER_PREPOSITIONS = word_set(
    "by near beside behind under below above beneath underneath over between among around alongside from to towards "
    "toward before for into through across along past"
)
CLAUSE_WORDS = word_set(
    "and or with while whereas but which that who where when as plus than there it they we you i if because "
    "so only just also both all can could will may might here"
)
FUNCTION_WORDS = DETERMINERS | COPULAS | LOCATIVES | OTHER_PREPOSITIONS | CLAUSE_WORDS | {"of"}
GENERIC_NOUNS = word_set(
    "item items object objects thing things one ones element elements entity entities subject subjects unit units "
    "instance instances total count them main image picture photo photograph scene"
)
MEASURES = word_set(
    "head heads piece pieces slice slices floret florets stalk stalks unit units loaf loaves portion portions "
    "copy copies specimen specimens individual individuals"
)
INDIRECT = word_set("past riding rides wearing wears holding holds facing faces looking perspective viewpoint viewer")
"""Words from which only world knowledge could tell where things are."""
ARITHMETIC_NOUNS = word_set("row rows column columns group groups set sets stack stacks pile piles pairs bunches")
_BOUNDS = (
    "at least,at most,more than,less than,fewer than,over,about,around,approximately,roughly,nearly,almost,up to,"
    "perhaps,maybe,no more than,no less than,or more,or so,or fewer,or less"
)
BOUNDS = tuple(_BOUNDS.split(","))
ADJECTIVES = SHADES | word_set(
    "big small large little tiny huge old new young wooden metal plastic tall short long round cute"
)


def plurals(name: str) -> set[str]:
    """`name` in its plural forms: irregular, regular, and GenEval's ("s", or "es" after s). A few are no English.

    Example: plurals("bench") -> {"benchs", "benches"}; plurals("teddy bear") -> {"teddy bears"}
    """
    *front, last = name.split(" ")
    forms = {last + ("es" if last.endswith("s") else "s")}
    if last in IRREGULAR_PLURALS:
        forms.add(IRREGULAR_PLURALS[last])
    elif last.endswith(("x", "z", "ch", "sh", "o")):
        forms.add(last + "es")
    elif last.endswith("y") and last[-2:-1] not in {"a", "e", "i", "o", "u"}:
        forms.add(last[:-1] + "ies")
    elif last.endswith("f"):
        forms.add(last[:-1] + "ves")
    elif last.endswith("fe"):
        forms.add(last[:-2] + "ves")
    elif last.endswith("man"):
        forms.add(last[:-3] + "men")
    return {" ".join([*front, form]) for form in forms}


def singulars(name: str) -> set[str]:
    """What `name` may be a regular plural of. Example: singulars("boxes") -> {"boxe", "box"}; of "cat": none."""
    endings = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
    return {name[: -len(old)] + new for old, new in endings if name.endswith(old) and len(name) > len(old) + 1}
