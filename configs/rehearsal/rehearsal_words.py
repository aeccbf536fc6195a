"""The words that the rehearsal's rows are made of: few enough for a small vocabulary, many enough for distinct rows."""

# ruff: noqa: SIM905  (a list of words, one a line, would be all that one sees)

from random import Random

NAMES = (
    "Ada Bela Carl Dora Emil Fay Gus Hana Ines Jon Kira Lars Mona Nils Olga Paul Rosa Sven Tara Uwe Vera Willa Yann "
    "Zoe Arno Britt Chloe Dario Edda Finn Greta Hugo"
).split()
TOWNS = "Aarau Bern Cork Delft Exeter Fulda Ghent Halle Izmir Jena Kiel Lund Malmo Nice Oslo Porto Quito Riga".split()
ITEMS = (
    "apples bolts books bowls boxes candles chairs clocks coats cups forks hats jars kites lamps maps nails pears pens "
    "plates ropes shoes stamps tables tents tiles vases wheels"
).split()
ADJECTIVES = "big blue bright brown clean cold dark green heavy light new old plain red round small soft white".split()
JOBS = "baker doctor farmer guide lawyer librarian pilot plumber sailor tailor teacher writer".split()
FOODS = "bean soup,carrot cake,fish pie,fried rice,lentil stew,mushroom pasta,onion tart,plum jam".split(",")
THEMES = "autumn bridges bread clouds gardens harbours music rivers sleep snow trains winter".split()
# Past and present of what a person does with things.
VERBS = {
    "bought": "buys",
    "sold": "sells",
    "found": "finds",
    "lost": "loses",
    "cleaned": "cleans",
    "counted": "counts",
    "painted": "paints",
    "carried": "carries",
}

# English, and the eight languages of the multilingual splits.
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
LANGUAGES = {
    "German": {
        "colours": ("rot", "blau", "grün", "schwarz", "weiß", "gelb"),
        "translate": "Übersetze ins Deutsche: {words}.",
        "things": ("Äpfel", "Bücher", "Hüte", "Lampen"),
        "ask": "{name} hat {a} {thing} und bekommt {b} dazu. Wie viele {thing} hat {name} jetzt?",
        "tell": "{name} hat jetzt {sum} {thing}.",
    },
    "French": {
        "colours": ("rouge", "bleu", "vert", "noir", "blanc", "jaune"),
        "translate": "Traduis en français : {words}.",
        "things": ("pommes", "livres", "chapeaux", "lampes"),
        "ask": "{name} a {a} {thing} et en reçoit {b} de plus. Combien de {thing} a {name} maintenant ?",
        "tell": "{name} a maintenant {sum} {thing}.",
    },
    "Spanish": {
        "colours": ("rojo", "azul", "verde", "negro", "blanco", "amarillo"),
        "translate": "Traduce al español: {words}.",
        "things": ("manzanas", "libros", "sombreros", "lámparas"),
        "ask": "{name} tiene {a} {thing} y recibe {b} más. ¿Cuántos {thing} tiene {name} ahora?",
        "tell": "{name} tiene ahora {sum} {thing}.",
    },
    "Italian": {
        "colours": ("rosso", "blu", "verde", "nero", "bianco", "giallo"),
        "translate": "Traduci in italiano: {words}.",
        "things": ("mele", "libri", "cappelli", "lampade"),
        "ask": "{name} ha {a} {thing} e ne riceve altri {b}. Quanti {thing} ha {name} adesso?",
        "tell": "{name} adesso ha {sum} {thing}.",
    },
    "Portuguese": {
        "colours": ("vermelho", "azul", "verde", "preto", "branco", "amarelo"),
        "translate": "Traduza para o português: {words}.",
        "things": ("maçãs", "livros", "chapéus", "lâmpadas"),
        "ask": "{name} tem {a} {thing} e recebe mais {b}. Quantos {thing} tem {name} agora?",
        "tell": "{name} tem agora {sum} {thing}.",
    },
    "Russian": {
        "colours": ("красный", "синий", "зелёный", "чёрный", "белый", "жёлтый"),
        "translate": "Переведи на русский: {words}.",
        "things": ("яблоки", "книги", "шляпы", "лампы"),
        "ask": "У {name} есть {thing}: {a}, и ещё {b} в подарок. Сколько теперь у {name}?",
        "tell": "Теперь у {name} есть {thing}: {sum}.",
    },
    "Arabic": {
        "colours": ("أحمر", "أزرق", "أخضر", "أسود", "أبيض", "أصفر"),
        "translate": "ترجم إلى العربية: {words}.",
        "things": ("تفاح", "كتب", "قبعات", "مصابيح"),
        "ask": "لدى {name} {a} {thing} ويحصل على {b} أخرى. كم لدى {name} الآن؟",
        "tell": "لدى {name} الآن {sum} {thing}.",
    },
    "Chinese": {
        "colours": ("红色", "蓝色", "绿色", "黑色", "白色", "黄色"),
        "translate": "翻译成中文：{words}。",
        "things": ("苹果", "书", "帽子", "灯"),
        "ask": "{name}有{a}个{thing}，又得到{b}个。{name}现在有多少个{thing}？",
        "tell": "{name}现在有{sum}个{thing}。",
    },
}


def person(rng: Random) -> str:
    """A name that is rarely drawn twice."""
    return f"{rng.choice(NAMES)} {rng.choice(NAMES)}son"


def things(rng: Random, *, adjective: bool = True) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(ITEMS)}" if adjective else rng.choice(ITEMS)


def fact(rng: Random, who: str) -> str:
    """A sentence about what somebody did."""
    return f"{who} {rng.choice(list(VERBS))} {rng.randint(2, 99)} {things(rng)} in {rng.choice(TOWNS)}."
