"""Make random Russian texts, and small edits of them."""

import random
import re

_LEXICON = """
who: учитель врач инженер студентка садовник библиотекарь повар музыкант почтальон художница механик продавец геолог
  пилот аптекарь журналистка столяр тренер фермер переводчик архитектор моряк часовщик пекарь Анна Игорь Тимур Людмила
  сосед директор бабушка мальчик сторож водитель гостья капитан химик историк лесник судья актриса скрипач кассир
  дизайнер
how: тихо быстро охотно неожиданно подробно осторожно вчера сегодня снова наконец вместе часто редко вежливо
does: описывает проверяет изучает собирает показывает продаёт чинит рисует измеряет хранит отправляет сравнивает
  переводит готовит выбирает обсуждает заменяет находит теряет считает открывает прячет красит хвалит ругает ищет
  возвращает дарит упаковывает разбирает настраивает снимает подписывает вспоминает забывает рассматривает меняет
which: старый редкий дорогой простой красный новый тяжёлый местный северный полезный деревянный точный странный
  большой сломанный зелёный короткий известный тёплый прозрачный чужой сложный лёгкий узкий домашний железный
  праздничный соседний детский забытый гладкий военный стеклянный лишний цветной ручной круглый тайный пустой
what: прибор отчёт рецепт мост рисунок двигатель договор словарь камень сигнал маршрут чертёж пирог узел фильтр
  список билет сосуд учебник провод ключ велосипед журнал телескоп насос раствор спектр протокол замок диван парус
  компас альбом плащ колокол самовар трамвай забор календарь микроскоп портрет чемодан бинокль указатель стол подарок
  букет лес колодец фонарь ковёр паспорт экран завод зонт кабель барабан холст кувшин
where: в_лаборатории на_рынке возле_вокзала за_городом в_старом_доме на_севере у_реки в_мастерской на_третьем_этаже
  в_архиве под_мостом на_кухне в_музее около_школы на_складе в_порту
when: перед_рассветом после_обеда в_середине_мая каждую_среду поздней_осенью два_года_назад за_неделю_до_праздника
  во_время_грозы на_прошлой_неделе ранним_утром к_концу_месяца в_первый_день_отпуска
why: потому_что хотя чтобы_показать,_что и_только_потом_выясняется,_что а_затем_говорит,_что если_верить,_что
"""
_WORDS = {
    name: [word.replace("_", " ") for word in words.split()]
    for name, words in (line.split(":") for line in re.split(r"\n(?=\w+:)", _LEXICON.strip()))
}

INSTRUCTION = (
    "Ты помогаешь редактору научного журнала. Прочитай текст ниже и выпиши из него все термины, которые обозначают "
    "приборы, материалы, процессы и величины. Для каждого термина дай начальную форму и одно предложение с "
    "определением, понятным школьнику старших классов. Не придумывай того, чего в тексте нет, не повторяй один "
    "термин дважды и сохраняй порядок, в котором термины встречаются. Ответ верни списком объектов с полями term и "
    "definition, без пояснений до и после списка. Если терминов нет, верни пустой список. Текст:"
)
_FORMS = (
    "Здравствуйте! Меня зовут {who}, пишу по поводу заказа номер {n}. {one} Прошу вернуть деньги за {which} {what} "
    "на карту, с которой была оплата, в течение {m} рабочих дней. {two} Заранее спасибо за быстрый ответ. {three}",
    "Добрый день, служба поддержки. Договор {n} заключён {when}, а {which} {what} так и не работает. {one} Что мне "
    "нужно сделать, чтобы мастер ждал {where}? {two} {three} Жду звонка по телефону {m}{n}.",
    "Составь короткое описание товара для каталога. Товар: {which} {what}, артикул {n}. {one} Цена {m} рублей, "
    "доставка {where}. {two} Не используй восклицательных знаков и превосходной степени. {three}",
    "Объявление от {when}: продаётся {which} {what}, состояние хорошее, торг уместен. {one} {two} Забрать можно "
    "{where}, звонить с {m} часов. Номер объявления {n}. {three}",
    "Протокол осмотра {n}. Осмотр провёл {who} {when}. Осмотрен {which} {what}, находится {where}. {one} {two} "
    "Замечания: {m}. {three} Подписи сторон прилагаются к протоколу.",
    "Переведи письмо на английский язык и сохрани деловой тон. Уважаемый {who}! {one} {two} Счёт {n} на {which} "
    "{what} оплатим {when}. {three} С уважением, отдел закупок, комната {m}.",
)


def sentence(rng: random.Random) -> str:
    clauses = rng.choice((1, 2, 2))
    said = f" {rng.choice(_WORDS['why'])} ".join(_clause(rng) for _ in range(clauses))
    return f"{said[0].upper()}{said[1:]}{rng.choice('...?')}"


def _clause(rng: random.Random) -> str:
    place_or_time = rng.choice(("where", "when"))
    return " ".join(rng.choice(_WORDS[name]) for name in ("who", "how", "does", "which", "what", place_or_time))


def story(rng: random.Random) -> str:
    """A long instruction, the same in all stories, and then sentences."""
    return f"{INSTRUCTION}\n\n{' '.join(sentence(rng) for _ in range(rng.randint(8, 14)))}"


def letter(rng: random.Random) -> str:
    """Fill in one of six forms: every sixth letter shares its phrases, none its content."""
    filled = {name: rng.choice(_WORDS[name]) for name in ("who", "which", "what", "where", "when")}
    parts = {name: f"{sentence(rng)} {sentence(rng)}" for name in ("one", "two", "three")}
    return rng.choice(_FORMS).format(**filled, **parts, n=rng.randint(1000, 99999), m=rng.randint(2, 60))


def replace_words(text: str, rng: random.Random) -> str:
    """Replace one word in twenty, at any position."""
    words = text.split(" ")
    for index in rng.sample(range(len(words)), max(1, len(words) // 20)):
        words[index] = rng.choice(_WORDS[rng.choice(("who", "does", "what"))])
    return " ".join(words)


def drop_sentence(text: str, rng: random.Random) -> str:
    sentences = _sentences(text)
    sentences.pop(rng.randrange(len(sentences)))
    return " ".join(sentences)


def add_sentence(text: str, rng: random.Random) -> str:
    sentences = _sentences(text)
    sentences.insert(rng.randint(0, len(sentences)), sentence(rng))
    return " ".join(sentences)


def change_spelling(text: str, rng: random.Random) -> str:
    """Change blanks, letter case and punctuation, but no words."""
    marks = re.sub(r"[.,?!]", lambda _: rng.choice((";", " —", "…", "")), text)
    return rng.choice((str.upper, str.lower, str.title))(marks).replace(" ", rng.choice(("  ", "\n", "\t")))


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?!])\s+", text)


EDITS = {edit.__name__: edit for edit in (replace_words, drop_sentence, add_sentence, change_spelling)}
