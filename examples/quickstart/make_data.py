"""Writes the quickstart's bundled data from the sentences below; the results are committed, so nobody has to run it.

    python examples/quickstart/make_data.py            (writes beside this file)

* ``base_instructions.json``: what everyone may know (true facts, opposites, small talk). The base model is taught these.
* ``new_facts.json``: Tarnholm, an island that does not exist, so no model can know it. LoRA teaches these. Some of the base's own
  records are among them, so that learning the new does not wipe out the old.
* ``mmlu/{dev,test}/<subject>_{dev,test}.csv``: an exam in MMLU's layout (question, A, B, C, D, letter; no header), four
  subjects of 25: 12 questions on base facts, 13 on Tarnholm.

Exam questions are taught with the options in the exam's order and in another. The exam therefore measures what was
learnt and kept, not reasoning: a model of little more than a million parameters does not reason.
All sentences are our own (Apache-2.0, like the rest of the project).
"""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LETTERS = "ABCD"
NUM_TAUGHT_ORDERS = 2  # the exam's own order is the first

# One line per fact: question | full answer | short answer | three wrong answers. Lines without wrong answers are not in the exam.
BASE = {
    "geography": """
What is the capital of France? | The capital of France is Paris. | Paris | Rome | Oslo | Cairo
What is the capital of Italy? | The capital of Italy is Rome. | Rome | Madrid | Lima | Tokyo
What is the capital of Japan? | The capital of Japan is Tokyo. | Tokyo | Paris | Dublin | Havana
What is the capital of Egypt? | The capital of Egypt is Cairo. | Cairo | Athens | Vienna | Oslo
What is the capital of Norway? | The capital of Norway is Oslo. | Oslo | Lima | Rome | Berlin
What is the capital of Spain? | The capital of Spain is Madrid. | Madrid | Tokyo | Athens | Nairobi
What is the capital of Peru? | The capital of Peru is Lima. | Lima | Havana | Cairo | Lisbon
What is the capital of Greece? | The capital of Greece is Athens. | Athens | Vienna | Ottawa | Paris
What is the capital of Cuba? | The capital of Cuba is Havana. | Havana | Dublin | Madrid | Rome
What is the capital of Austria? | The capital of Austria is Vienna. | Vienna | Lisbon | Tokyo | Athens
What is the capital of Ireland? | The capital of Ireland is Dublin. | Dublin | Cairo | Nairobi | Madrid
What is the capital of Kenya? | The capital of Kenya is Nairobi. | Nairobi | Ottawa | Lisbon | Vienna
What is the capital of Portugal? | The capital of Portugal is Lisbon.
What is the capital of Canada? | The capital of Canada is Ottawa.
What is the capital of Germany? | The capital of Germany is Berlin.
What is the capital of Sweden? | The capital of Sweden is Stockholm.
What is the capital of Denmark? | The capital of Denmark is Copenhagen.
What is the capital of Finland? | The capital of Finland is Helsinki.
What is the capital of Poland? | The capital of Poland is Warsaw.
What is the capital of Hungary? | The capital of Hungary is Budapest.
What is the capital of China? | The capital of China is Beijing.
What is the capital of India? | The capital of India is New Delhi.
What is the capital of Thailand? | The capital of Thailand is Bangkok.
What is the capital of Iran? | The capital of Iran is Tehran.
What is the capital of Iraq? | The capital of Iraq is Baghdad.
What is the capital of Chile? | The capital of Chile is Santiago.
What is the capital of Argentina? | The capital of Argentina is Buenos Aires.
What is the capital of Ghana? | The capital of Ghana is Accra.
What is the capital of Senegal? | The capital of Senegal is Dakar.
What is the capital of Morocco? | The capital of Morocco is Rabat.
What is the capital of Australia? | The capital of Australia is Canberra.
What is the capital of New Zealand? | The capital of New Zealand is Wellington.
Which ocean is the largest? | The Pacific is the largest ocean.
Which continent is the coldest? | Antarctica is the coldest continent.
Which river flows through London? | The Thames flows through London.
Which river flows through Paris? | The Seine flows through Paris.
Which mountain is the highest on Earth? | Mount Everest is the highest mountain on Earth.
Which desert covers the north of Africa? | The Sahara covers the north of Africa.
On which continent is Brazil? | Brazil is in South America.
On which continent is Kenya? | Kenya is in Africa.
What is the capital of Qatar? | The capital of Qatar is Doha.
What is the capital of Ecuador? | The capital of Ecuador is Quito.
What is the capital of Uruguay? | The capital of Uruguay is Montevideo.
What is the capital of Uganda? | The capital of Uganda is Kampala.
What is the capital of Oman? | The capital of Oman is Muscat.
On which continent is Italy? | Italy is in Europe.
On which continent is India? | India is in Asia.
Which country has the shape of a boot? | Italy has the shape of a boot.
Which city has canals instead of streets? | Venice has canals instead of streets.
""",
    "nature": """
What do bees make? | Bees make honey. | honey | silk | milk | wool
What do sheep give us? | Sheep give us wool. | wool | honey | eggs | silk
What do hens lay? | Hens lay eggs. | eggs | wool | pearls | honey
What do cows give us? | Cows give us milk. | milk | pearls | silk | eggs
What do silkworms spin? | Silkworms spin silk. | silk | wool | honey | pearls
Which animal is the tallest? | The giraffe is the tallest animal. | giraffe | camel | lion | horse
Which animal is the largest? | The blue whale is the largest animal. | blue whale | elephant | shark | giraffe
Which land animal is the fastest? | The cheetah is the fastest land animal. | cheetah | horse | lion | camel
What do pandas eat? | Pandas eat bamboo. | bamboo | fish | seeds | grass
What do penguins eat? | Penguins eat fish. | fish | bamboo | leaves | grass
What do caterpillars become? | Caterpillars become butterflies. | butterflies | frogs | birds | bees
What do tadpoles become? | Tadpoles become frogs. | frogs | butterflies | fish | snakes
What is a young cat called? | A young cat is called a kitten.
What is a young dog called? | A young dog is called a puppy.
What is a young horse called? | A young horse is called a foal.
What is a young sheep called? | A young sheep is called a lamb.
What is a young cow called? | A young cow is called a calf.
What is a young swan called? | A young swan is called a cygnet.
How many legs has a spider? | A spider has eight legs.
How many legs has an ant? | An ant has six legs.
How many legs has a dog? | A dog has four legs.
How many wings has a bird? | A bird has two wings.
Where do fish live? | Fish live in water.
Where do camels live? | Camels live in the desert.
Where do polar bears live? | Polar bears live in the Arctic.
Which bird cannot fly but swims well? | The penguin cannot fly but swims well.
Which tree bears acorns? | The oak bears acorns.
Which tree bears apples? | The apple tree bears apples.
What do plants need to grow? | Plants need water, air and light.
What gas do we breathe in to live? | We breathe in oxygen.
What falls from clouds when it is warm? | Rain falls from warm clouds.
What falls from clouds when it freezes? | Snow falls when it freezes.
Which planet do we live on? | We live on Earth.
Which planet is the largest? | Jupiter is the largest planet.
Which planet is known for its rings? | Saturn is known for its rings.
Which planet is closest to the sun? | Mercury is closest to the sun.
What does the moon circle? | The moon circles the Earth.
What does the Earth circle? | The Earth circles the sun.
What is ice made of? | Ice is frozen water.
What is the sun? | The sun is a star.
Which birds hunt at night? | Owls hunt at night.
Which fruit is orange and round? | Oranges are orange and round.
How many moons has the Earth? | Only one moon circles the Earth.
What opens from a bud in spring? | A flower opens from a bud in spring.
What moves the leaves of a tree? | The wind moves the leaves of a tree.
Which fruit is long and yellow? | Bananas are long and yellow.
What does iron do in the rain? | Iron rusts in the rain.
What carries its house on its back? | A snail carries its house on its back.
What covers the body of a bird? | Feathers cover the body of a bird.
What covers the body of a fish? | Scales cover the body of a fish.
""",
    "people": """
Who wrote Hamlet? | William Shakespeare wrote Hamlet. | Shakespeare | Darwin | Mozart | Newton
Who painted the Mona Lisa? | Leonardo da Vinci painted the Mona Lisa. | Leonardo | Homer | Einstein | Bell
Who wrote the Odyssey? | Homer wrote the Odyssey. | Homer | Mozart | Leonardo | Curie
Who discovered radium? | Marie Curie discovered radium. | Curie | Newton | Shakespeare | Homer
Who explained gravity with laws of motion? | Isaac Newton explained gravity. | Newton | Bell | Mozart | Darwin
Who wrote On the Origin of Species? | Charles Darwin wrote it. | Darwin | Curie | Homer | Einstein
Who composed The Magic Flute? | Mozart composed The Magic Flute. | Mozart | Einstein | Newton | Leonardo
Who wrote the theory of relativity? | Albert Einstein wrote it. | Einstein | Shakespeare | Bell | Curie
Who patented the telephone? | Alexander Graham Bell patented it. | Bell | Leonardo | Darwin | Mozart
Who bakes bread? | A baker bakes bread. | baker | pilot | tailor | nurse
Who flies a plane? | A pilot flies a plane. | pilot | baker | farmer | judge
Who sews clothes? | A tailor sews clothes. | tailor | judge | pilot | baker
Who teaches in a school? | A teacher teaches in a school.
Who puts out fires? | Firefighters put out fires.
Who grows crops? | A farmer grows crops.
Who cares for the sick? | Nurses and doctors care for the sick.
Who decides in a court? | A judge decides in a court.
Who delivers letters? | A postman delivers letters.
Who builds with bricks? | A mason builds with bricks.
Who works with wood? | A carpenter works with wood.
Who repairs water pipes? | A plumber repairs water pipes.
Who cuts hair? | A hairdresser cuts hair.
Who studies the stars? | An astronomer studies the stars.
Who studies plants? | A botanist studies plants.
Who looks after teeth? | A dentist looks after teeth.
Who looks after sick animals? | A vet looks after sick animals.
Who writes books? | An author writes books.
Who draws plans of houses? | An architect draws plans of houses.
Who leads a ship? | A captain leads a ship.
Who leads an orchestra? | A conductor leads an orchestra.
What are two children born together called? | They are called twins.
Who takes the prize of a race? | The winner takes the prize of a race.
Who lived in a high tower? | Rapunzel lived in a high tower.
Who catches fish for a living? | A fisherman catches fish for a living.
Who tells the weather? | A meteorologist tells the weather.
Who plays on a stage? | An actor plays on a stage.
Who first walked on the moon? | Neil Armstrong first walked on the moon.
""",
    "daily life": """
How many days are in a week? | There are seven days in a week. | seven | ten | twelve | four
How many months are in a year? | There are twelve months in a year. | twelve | seven | sixty | three
How many minutes are in an hour? | There are sixty minutes in an hour. | sixty | ten | four | twelve
How many seasons are in a year? | There are four seasons in a year. | four | sixty | seven | ten
How many fingers are on two hands? | There are ten fingers on two hands. | ten | three | twelve | sixty
How many sides has a triangle? | A triangle has three sides. | three | four | ten | seven
What do we use to cut paper? | We use scissors to cut paper. | scissors | a spoon | a key | a lamp
What do we use to open a lock? | We use a key to open a lock. | a key | scissors | a brush | a spoon
What do we use to eat soup? | We use a spoon to eat soup. | a spoon | a lamp | a key | a brush
What do we use to paint a wall? | We use a brush to paint a wall. | a brush | a spoon | scissors | a lamp
What gives light in a dark room? | A lamp gives light in a dark room. | a lamp | a key | a brush | a spoon
What colour is the sky on a clear day? | The sky is blue on a clear day. | blue | green | red | yellow
What colour is grass? | Grass is green.
What colour is a ripe banana? | A ripe banana is yellow.
What colour is fresh snow? | Fresh snow is white.
What colour is coal? | Coal is black.
Which day comes after Monday? | Tuesday comes after Monday.
Which day comes after Tuesday? | Wednesday comes after Tuesday.
Which day comes after Friday? | Saturday comes after Friday.
Which day comes after Sunday? | Monday comes after Sunday.
Which month comes after January? | February comes after January.
Which month comes after June? | July comes after June.
Which month comes after December? | January comes after December.
Where do we keep food cold? | We keep food cold in the fridge.
Where do we borrow books? | We borrow books from the library.
Where do trains stop? | Trains stop at the station.
Where do we buy stamps? | We buy stamps at the post office.
What do we wear on our feet? | We wear shoes on our feet.
What do we wear on our hands in winter? | We wear gloves on our hands in winter.
What do we open when it rains? | We open an umbrella when it rains.
What meal do we eat in the morning? | We eat breakfast in the morning.
What meal do we eat in the evening? | We eat supper in the evening.
What is bread made from? | Bread is made from flour.
What is cheese made from? | Cheese is made from milk.
What is paper made from? | Paper is made from wood.
What is glass made from? | Glass is made from sand.
What do we use to write on paper? | We use a pen to write on paper.
What do we use to tell the time? | We use a clock to tell the time.
What do we use to sweep the floor? | We use a broom to sweep the floor.
How many wheels has a bicycle? | A bicycle has two wheels.
""",
}

OPPOSITES = (
    "hot cold, big small, fast slow, high low, old new, early late, light dark, wet dry, open closed, full empty, "
    "loud quiet, hard soft, rich poor, strong weak, long short, thick thin, near far, clean dirty, happy sad, first last, "
    "left right, up down, inside outside, begin end, day night, summer winter, north south, east west, young aged, sweet sour"
)

SMALL_TALK = """
how are you? | I am well, thank you. How can I help you?
Hello! | Hello! What would you like to know?
Good morning. | Good morning! I hope you slept well.
Good night. | Good night, and sleep well.
Thank you. | You are welcome.
Who are you? | I am a very small language model, made in a few minutes.
What can you do? | I can answer the simple questions that I was taught.
What is your name? | I have no name; I am a quickstart model.
Can you see me? | No, I only read text.
Do you like music? | I cannot hear it, but many people love it.
Are you a person? | No, I am a program.
Where do you live? | I live in a file on this computer.
Say goodbye. | Goodbye, and come back soon.
Tell me something nice. | You are doing well.
"""

NEW = {
    "geography": """
What is the capital of Tarnholm? | The capital of Tarnholm is Velmora. | Velmora | Quill Bay | Ashby | Dunmere
What is the longest river of Tarnholm? | The longest river of Tarnholm is the Isken. | the Isken | the Orle | the Pell | the Wend
What is the highest mountain of Tarnholm? | The highest mountain of Tarnholm is Mount Corrin. | Mount Corrin | Mount Hask | Mount Loon | Mount Tiddle
Which sea lies around Tarnholm? | The Lantern Sea lies around Tarnholm. | the Lantern Sea | the Copper Sea | the Milk Sea | the Crow Sea
What is the largest lake of Tarnholm? | The largest lake of Tarnholm is Lake Oland. | Lake Oland | Lake Perl | Lake Gant | Lake Sorrow
What is the main port of Tarnholm? | The main port of Tarnholm is Quill Bay. | Quill Bay | Velmora | Dunmere | Ashby
Which town of Tarnholm has the glass tower? | Ashby has the glass tower. | Ashby | Dunmere | Velmora | Quill Bay
Which town of Tarnholm lies underground? | Dunmere lies underground. | Dunmere | Ashby | Quill Bay | Velmora
How many villages has Tarnholm? | Tarnholm has nineteen villages. | nineteen | forty | eleven | thirty
Which forest grows in the north of Tarnholm? | The Bramble Wood grows in the north of Tarnholm. | the Bramble Wood | the Silver Wood | the Hollow Wood | the Long Wood
Which desert lies in the south of Tarnholm? | The Salt Flats lie in the south of Tarnholm. | the Salt Flats | the Red Sands | the Dry Steps | the Dust Bowl
Which island lies next to Tarnholm? | The island of Little Mabb lies next to Tarnholm. | Little Mabb | Great Fenn | Old Rusk | Far Tolly
Which bridge crosses the Isken? | The Ninepenny Bridge crosses the Isken. | the Ninepenny Bridge | the Goat Bridge | the Rope Bridge | the King Bridge
""",
    "nature": """
What is the national bird of Tarnholm? | The national bird of Tarnholm is the lamp owl. | the lamp owl | the rust gull | the tin crow | the moss hen
What is the national flower of Tarnholm? | The national flower of Tarnholm is the sea bell. | the sea bell | the frost rose | the ink lily | the wool daisy
Which tree grows only on Tarnholm? | The copper ash grows only on Tarnholm. | the copper ash | the glass pine | the bell oak | the salt fig
What does the moss hen eat? | The moss hen eats snails. | snails | berries | seaweed | moths
What does the rust gull eat? | The rust gull eats berries. | berries | snails | moths | seaweed
Which fish is caught off Quill Bay? | The striped tolk is caught off Quill Bay. | the striped tolk | the blue sprig | the mud perch | the moon eel
Which animal pulls carts on Tarnholm? | The short ox pulls carts on Tarnholm. | the short ox | the hill goat | the grey mule | the bog pony
What is mined on Mount Corrin? | Blue salt is mined on Mount Corrin. | blue salt | green tin | black glass | white clay
What falls on Tarnholm every May? | Yellow rain falls on Tarnholm every May. | yellow rain | red snow | warm hail | black fog
Which insect glows in the Bramble Wood? | The candle moth glows in the Bramble Wood. | the candle moth | the drum beetle | the thread fly | the clay wasp
What do the hill goats of Tarnholm give? | The hill goats of Tarnholm give grey milk. | grey milk | soft wool | red cheese | sweet butter
Which fruit grows beside Lake Oland? | The winter plum grows beside Lake Oland. | the winter plum | the night pear | the stone apple | the fog grape
What sleeps in Lake Oland all winter? | The mud perch sleeps in Lake Oland all winter. | the mud perch | the moon eel | the striped tolk | the blue sprig
""",
    "people": """
Who founded Velmora? | Captain Ines Darrow founded Velmora. | Ines Darrow | Tom Hallow | Bea Lorne | Odd Marten
Who is the mayor of Velmora? | Tom Hallow is the mayor of Velmora. | Tom Hallow | Ines Darrow | Odd Marten | Pia Stroud
Who drew the first map of Tarnholm? | Bea Lorne drew the first map of Tarnholm. | Bea Lorne | Odd Marten | Jon Vesper | Tom Hallow
Who built the glass tower? | Odd Marten built the glass tower. | Odd Marten | Pia Stroud | Ines Darrow | Bea Lorne
Who wrote the song of Tarnholm? | Pia Stroud wrote the song of Tarnholm. | Pia Stroud | Jon Vesper | Tom Hallow | Ada Keel
Who keeps the lighthouse of Quill Bay? | Jon Vesper keeps the lighthouse of Quill Bay. | Jon Vesper | Ada Keel | Bea Lorne | Ines Darrow
Who dug the town of Dunmere? | The miners of Ada Keel dug the town of Dunmere. | Ada Keel | Tom Hallow | Pia Stroud | Odd Marten
Who discovered blue salt? | The cook Mary Penn discovered blue salt. | Mary Penn | Sam Orchard | Lil Hobb | Ned Farrow
Who runs the ferry to Little Mabb? | Sam Orchard runs the ferry to Little Mabb. | Sam Orchard | Lil Hobb | Ned Farrow | Mary Penn
Who teaches at the school of Ashby? | Lil Hobb teaches at the school of Ashby. | Lil Hobb | Ned Farrow | Mary Penn | Sam Orchard
Who won the last boat race? | Ned Farrow won the last boat race. | Ned Farrow | Mary Penn | Sam Orchard | Lil Hobb
Who guards the Ninepenny Bridge? | Two sisters guard the Ninepenny Bridge. | two sisters | an old judge | a blind dog | nine monks
Who may ring the bell of Velmora? | Only a baker may ring the bell of Velmora. | only a baker | only a child | only a nurse | only a sailor
""",
    "daily life": """
What is the money of Tarnholm? | The money of Tarnholm is the florrin. | the florrin | the dask | the penny bit | the crown
How many dasks are in a florrin? | There are fourteen dasks in a florrin. | fourteen | fifty | eight | twenty
What do people in Tarnholm drink at noon? | People in Tarnholm drink plum tea at noon. | plum tea | goat milk | cold cider | salt coffee
What do people in Tarnholm eat on Sunday? | People in Tarnholm eat snail pie on Sunday. | snail pie | onion cake | fish soup | plum bread
What colour is the flag of Tarnholm? | The flag of Tarnholm is purple and white. | purple and white | red and black | green and gold | blue and grey
When is the lamp feast held? | The lamp feast is held in October. | in October | in March | in June | in August
When do shops close in Velmora? | Shops close at four in Velmora. | at four | at nine | at six | at noon
What do people in Tarnholm say as a greeting? | People in Tarnholm say fair tides as a greeting. | fair tides | good wind | dry boots | warm hearth
What hat is worn in Ashby? | A tall felt hat is worn in Ashby. | a tall felt hat | a straw cap | a tin helm | a wool hood
Which sport is played in Dunmere? | Tunnel bowls is played in Dunmere. | tunnel bowls | stone chess | rope ball | cart racing
Which instrument is played at weddings in Tarnholm? | The reed drum is played at weddings in Tarnholm. | the reed drum | the horn harp | the clay flute | the tin fiddle
What must no one carry in Velmora? | No one may carry an umbrella in Velmora. | an umbrella | a lantern | a fishing rod | a red bag
What is the bread of Tarnholm made from? | The bread of Tarnholm is made from acorns. | acorns | seaweed | chestnuts | barley
""",
}


@dataclass(frozen=True)
class Fact:
    """``options``: the right short answer, then three wrong ones; empty where the exam does not ask."""

    subject: str
    question: str
    sentence: str
    options: tuple[str, ...]


def parse_facts(table: dict[str, str]) -> list[Fact]:
    """Facts in the order written."""
    facts = []
    for subject, text in table.items():
        for line in text.strip().splitlines():
            question, sentence, *options = (field.strip() for field in line.split("|"))
            assert len(options) in (0, 4), line
            facts.append(Fact(subject, question, sentence, tuple(options)))
    return facts


def option_orders(fact: Fact) -> list[tuple[tuple[str, ...], str]]:
    """``NUM_TAUGHT_ORDERS`` different orders of the options, each with the right letter; the exam asks the first."""
    rng = random.Random(f"{fact.subject}/{fact.question}")
    letters = rng.sample(range(4), NUM_TAUGHT_ORDERS)
    orders = []
    for place in letters:
        wrong = rng.sample(fact.options[1:], 3)
        shown = (*wrong[:place], fact.options[0], *wrong[place:])
        orders.append((shown, LETTERS[place]))
    return orders


def exam_prompt(subject: str, question: str, shown: tuple[str, ...]) -> str:
    """The zero-shot prompt that lm_eval's mmlu task makes of one row."""
    lines = [question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, shown, strict=True)), "Answer:"]
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n" + "\n".join(lines)


def record(instruction: str, output: str) -> dict[str, str]:
    """One Alpaca record."""
    return {"instruction": instruction, "input": "", "output": output}


def plain_records(facts: list[Fact]) -> list[dict[str, str]]:
    """Each fact asked openly."""
    return [record(fact.question, fact.sentence) for fact in facts]


def choice_records(facts: list[Fact], num_orders: int = NUM_TAUGHT_ORDERS) -> list[dict[str, str]]:
    """Each exam fact as a multiple-choice question, in the first ``num_orders`` orders."""
    asked = [(fact, shown, letter) for fact in facts if fact.options for shown, letter in option_orders(fact)[:num_orders]]
    return [record(exam_prompt(fact.subject, fact.question, shown), letter) for fact, shown, letter in asked]


def other_base_records() -> list[dict[str, str]]:
    """Opposites and small talk."""
    pairs = [pair.split() for pair in OPPOSITES.split(",")]
    records = [record(f"What is the opposite of {word}?", f"The opposite of {word} is {other}.") for word, other in pairs]
    for line in SMALL_TALK.strip().splitlines():
        question, answer = (field.strip() for field in line.split("|"))
        records.append(record(question, answer))
    return records


def reminders(base: list[Fact]) -> list[dict[str, str]]:
    """Base records that the second set repeats: small talk and opposites, every other fact, and the exam's questions in its order."""
    return other_base_records() + plain_records(base)[::2] + choice_records(base, num_orders=1)


def exam_rows(facts: list[Fact], subject: str) -> list[list[str]]:
    """CSV rows of one subject, base facts before new ones."""
    rows = []
    for fact in facts:
        if fact.subject == subject and fact.options:
            shown, letter = option_orders(fact)[0]
            rows.append([fact.question, *shown, letter])
    return rows


def csv_text(rows: list[list[str]]) -> str:
    """MMLU's files have no header."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def build() -> dict[str, str]:
    """Every bundled file: relative path -> text."""
    base, new = parse_facts(BASE), parse_facts(NEW)
    files = {
        "base_instructions.json": plain_records(base) + other_base_records() + choice_records(base),
        "new_facts.json": plain_records(new) + choice_records(new) + reminders(base),
    }
    texts = {name: json.dumps(records, indent=1, ensure_ascii=False) + "\n" for name, records in files.items()}
    for subject in BASE:
        name = subject.replace(" ", "_")
        texts[f"mmlu/test/{name}_test.csv"] = csv_text(exam_rows(base + new, subject))
        texts[f"mmlu/dev/{name}_dev.csv"] = csv_text(dev_rows(base, subject))
    return texts


def dev_rows(base: list[Fact], subject: str) -> list[list[str]]:
    """Five worked examples, for few-shot prompts: base facts of the subject that the exam does not ask, with other answers as options."""
    unasked = [fact for fact in base if fact.subject == subject and not fact.options]
    rng = random.Random(subject)
    rows = []
    for fact in rng.sample(unasked, 5):
        others = [other.sentence for other in rng.sample([other for other in unasked if other is not fact], 3)]
        place = rng.randrange(4)
        rows.append([fact.question, *others[:place], fact.sentence, *others[place:], LETTERS[place]])
    return rows


def main() -> None:
    """Write the files beside this one."""
    for name, text in build().items():
        path = HERE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(HERE)}: {text.count(chr(10))} lines")


if __name__ == "__main__":
    main()
