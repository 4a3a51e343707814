"""The words of the demo: how users put facts, and the sentences they and the assistant use."""

from __future__ import annotations

# Keywords in words, by what precedes them: a mood stands before "film", the others behind it. "keyword=words" where the
# two differ; keywords that are missing here read "about <keyword>".
_KEYWORDS = """
mood: bittersweet, bleak, claustrophobic, deadpan, disturbing, dreamlike, eerie, epic, fast-paced, feel-good,
  gritty, heartwarming, melancholy, mind-bending, nostalgic, poetic, quirky, stylish, surreal, tense, violent,
  whimsical, slapstick, anti-war, black and white=black-and-white, dark humor=darkly funny, dialogue-driven=talky,
  nonlinear=non-linear, satire=satirical, silent film=silent, slow burn=slow
set in: africa=Africa, ancient world=the ancient world, australia=Australia, china=China,
  countryside=the countryside, courtroom=a courtroom, desert=the desert, dystopia=a dystopia, england=England,
  france=France, germany=Germany, haunted house=a haunted house, hong kong=Hong Kong, india=India, iran=Iran,
  italy=Italy, japan=Japan, korea=Korea, london=London, los angeles=Los Angeles, medieval=the Middle Ages,
  mexico=Mexico, new york=New York, paris=Paris, period piece=another century, prison, russia=Russia,
  san francisco=San Francisco, scandinavia=Scandinavia, scotland=Scotland, single location=one place,
  small town=a small town, space, spain=Spain, summer, wilderness=the wilderness, winter=the snow
set: christmas=at Christmas, civil war=in a civil war, cold war=in the Cold War, halloween=in late October,
  island=on an island, ocean=at sea, post-apocalypse=after the end of the world, school=at a school,
  trains=on a train, workplace=at work, world war i=in the First World War, world war ii=in the Second World War
with: aliens, animals, battles=great battles, body horror, car chases, dance=dancing, demons,
  disguise=people in disguise, femme fatale=a femme fatale, ghosts, gunfights, love triangle=a love triangle,
  mad scientist=a mad scientist, magic, martial arts, monsters, music, odd couple=an odd couple, pirates, robots,
  samurai, strong heroine=a strong heroine, superheroes, toys, treasure hunt=a treasure hunt,
  twist ending=a twist at the end, vampires, witches, zombies
based on: based on a novel=a novel, true story=a true story
about: circus=the circus, class divide=rich and poor, conspiracy=a conspiracy, detective=a detective,
  disaster=a disaster, dysfunctional family=a family falling apart, fairy tale=a fairy tale, heist=a heist,
  hitman=a hitman, holocaust=the Holocaust, kidnapping=a kidnapping, lgbtq=queer lives, nuclear war=the bomb,
  on the run=people on the run, police=the police, revolution=a revolution, road trip=a road trip,
  serial killer=a serial killer, underdog=an underdog, undercover=going undercover, vietnam=the Vietnam War,
  wrong man=an innocent man accused
"""
_DECADES = "twenties thirties forties fifties sixties seventies eighties nineties".split()
DECADES = {str(1920 + 10 * place): name for place, name in enumerate(_DECADES)}
GENRE_NOUNS = {  # one, several, as an adjective
    "Action": ("action film", "action films", "action-packed"),
    "Adventure": ("adventure film", "adventure films", "adventurous"),
    "Animation": ("animated film", "cartoons", "animated"),
    "Biography": ("biopic", "biopics", "biographical"),
    "Comedy": ("comedy", "comedies", "funny"),
    "Crime": ("crime film", "crime films", "criminal"),
    "Documentary": ("documentary", "documentaries", "documentary-style"),
    "Drama": ("drama", "dramas", "dramatic"),
    "Family": ("family film", "family films", "child-friendly"),
    "Fantasy": ("fantasy film", "fantasy films", "fantastical"),
    "Horror": ("horror film", "horror films", "scary"),
    "Musical": ("musical", "musicals", "musical"),
    "Mystery": ("mystery", "mysteries", "mysterious"),
    "Romance": ("love story", "love stories", "romantic"),
    "Science Fiction": ("sci-fi film", "sci-fi films", "futuristic"),
    "Thriller": ("thriller", "thrillers", "suspenseful"),
    "War": ("war film", "war films", "wartime"),
    "Western": ("western", "westerns", "western"),
}


def _lines(table: str) -> dict[str, str]:
    """Name and content of every `name: content` line; a line that begins with two spaces continues the one before."""
    return dict(line.split(": ", 1) for line in table.replace("\n  ", " ").strip().splitlines())


def _keyword_phrases(table: str) -> tuple[dict[str, str], dict[str, str]]:
    """The moods as adjectives, and what is said behind "film" for the other keywords."""
    moods, tails = {}, {}
    for opening, entries in _lines(table).items():
        for entry in entries.split(", "):
            keyword, _, words = entry.partition("=")
            if opening == "mood":
                moods[keyword] = words or keyword
            else:
                tails[keyword] = f"{opening} {words or keyword}"
    return moods, tails


MOODS, TAILS = _keyword_phrases(_KEYWORDS)

# {films} may be one film or several; {want} is "a slow drama about memory" or "something slow". No words here may be a
# title as the catalog writes it: that could give a film of the ground truth away.
_TEMPLATES = """
greeting: Hi! | Hello! | Hey there. | Good evening. | Hi, quick question. | Hello, I need a hand. | Hey, me again.
situation: We are choosing for Friday night. | I have the evening to myself. | My sister is coming over tomorrow.
  | It is raining all day here. | I have a long flight ahead of me. | My film club asked me to bring a title.
  | I keep scrolling and never decide. | A friend and I take turns picking, and this week I pick.
  | I am home with a cold. | I just finished a series and want a film again. | Two of us, one sofa, no plan.
  | I want to catch up on what I have missed. | My partner picked last time, so this one is mine.
first films: I loved {films}. What else would I like? | Can you recommend more in the vein of {films}?
  | What should I watch after {films}? | I just watched {films} and want more of that. | Anything close to {films}?
  | My favourites are {films}. Where do I go from there? | I could watch {films} every year. What comes near?
  | Somebody showed me {films} and I was hooked. More, please! | I am looking for movies like {films}.
  | Which films belong next to {films}? | What do people who love {films} watch next?
later films: I also enjoyed {films}. | Then there is {films}, which I adore. | Oh, and {films}, of course.
  | Last month I saw {films} and was impressed. | Let me add {films} to that. | I grew up with {films}.
  | If it helps, I rate {films} very highly. | And I can never get enough of {films}.
first wish: I am looking for {want}. | Could you suggest {want}? | I would like to see {want}. | What about {want}?
  | I am in the mood for {want}. | Do you know {want}? | Tonight it has to be {want}. | Please find me {want}.
  | I want {want}, {contrast}. | Point me to {want}, {contrast}. | I feel like watching {want}.
  | For once I want {want}. | Help me find {want}, please. | I could do with {want}, {contrast}.
later wish: Preferably {want}. | Best of all would be {want}. | It could well be {want}. | In general I go for {want}.
  | Give me {want} and I am happy. | I never say no to {want}. | I tend to like {want}. | Make it {want}.
  | Right now I would pick {want}. | Let us say {want}, {contrast}.
both: I want {want} like {films}, {contrast}. | Could you find {want}, a bit like {films}?
  | I loved {films}, so {want} would be perfect. | After {films} I want {want}. | Think of {films}: I am after {want}.
  | {films} set the bar. Is there {want} as good as that? | I am searching for {want}. I already know {films}.
  | I would love {want}. My reference is {films}. | {films} got me started, so {want}, please.
  | Something along the lines of {films}, I mean {want}. | I need {want}, {contrast}. I liked {films} a lot.
  | Find me {want} for a fan of {films}. | You know {films}? In that spirit I want {want}.
  | {films} made my week. Next I want {want}.
contrast: but shorter | but longer | but easier to follow | but nothing experimental | but easy to find
  | but a little lighter | but with a better ending | if there is one I have missed | but nothing too long
  | if possible one that holds up today | but with a good score
ask: Sure. What have you enjoyed lately? | Happy to help. Anything else I should know? | Noted. Anything to add?
  | Of course. Which films do you come back to? | Good taste! Can you tell me a bit more? | Could you narrow it down?
  | I have a few ideas. What matters most to you? | Got it. What are you in the mood for?
  | Let me think. Is there anything you want more of? | Do you have another example for me?
suggest: Have you seen {film}? | How about {film}? | Then you might like {film}. | My first thought is {film}.
  | Do you know {film}? | Maybe {film}? | Many people with your taste like {film}. | I would start with {film}.
  | That makes me think of {film}. | What did you make of {film}?
accept: Seen it, and I loved it. | Yes, one of my favourites! | I know it well, great choice.
  | I have seen that one twice, more like it please. | Exactly my kind of film, but I have seen it.
  | That was wonderful. What else? | Loved it! You are on the right track.
reject: No, that one did nothing for me. I do not like {dislike}. | Not for me, I am no fan of {dislike}.
  | I tried it and gave up. I have no patience for {dislike}. | Saw it, hated it. Please no {dislike}.
  | I would rather not, I avoid {dislike}. | Sorry, wrong direction: {dislike} leave me cold.
  | Hmm, no. I am tired of {dislike}.
dislike: Please no {dislike}. | I cannot stand {dislike}. | Just keep {dislike} away from me.
  | You can skip {dislike}. | I do not care for {dislike}. | Anything but {dislike}. | I have had enough of {dislike}.
  | No {dislike}, though.
closer: Thanks! | Thank you in advance. | What do you say? | Surprise me. | Any ideas? | I trust you. | Over to you.
  | I am curious what you find.
"""
TEMPLATES = {kind: tuple(map(str.strip, templates.split("|"))) for kind, templates in _lines(_TEMPLATES).items()}
