"""The banned words and phrases of the prose linter, each with the replacement it suggests.

A pattern is a regular expression without case. It begins and ends at a word boundary, and a space in it matches any white space.
`unless` is searched in the text before the match and the match itself, so it can excuse a phrase by the words around it.
`in_question` allows the pattern in a question.
"""

from dataclasses import dataclass

# A person may be the subject of these verbs, software may not.
_A_PERSON = r"\b(you|users?|people|persons?|readers?|operators?|developers?|maintainers?|contributors?|authors?|annotators?)( who)?"


@dataclass(frozen=True)
class Rule:
    """A banned pattern, the text that replaces it, and a pattern of the matches that are allowed."""

    pattern: str
    replacement: str
    unless: str = ""
    in_question: bool = False


# Software does not sleep, wake, knock, look, say, want, give way or go on.
PERSONIFICATION = (
    Rule(r"(go|goes|going|went|gone) on", "continue, resume", r"going on at"),
    Rule(r"signs? of life", "heartbeat, keep-alive"),
    Rule(r"sleeps?|slept|sleeping|asleep", "wait, idle, scale to zero"),
    Rule(r"wakes?|woke|woken|waking|awake", "start, scale up"),
    Rule(r"knock(s|ed|ing)?", "check capacity, request"),
    Rule(r"(give|gives|gave|given|giving) way", "lower the priority, yield"),
    Rule(r"(give|gives|gave|given|giving) up", "stop retrying, time out"),
    Rule(r"told|tells?|telling", "report, show, send, distinguish"),
    Rule(r"says?|said|saying", "state, report, set, for example"),
    Rule(r"wants?|wanted|wanting|wish|wishes", "need, require, request", _A_PERSON + r" (may )?(wants?|wish)$"),
    Rule(r"looks?|looked|looking", "check, read, search, poll", _A_PERSON + r" (may )?looks?$"),
    Rule(r"knows?|knew", "support, accept, have, read", _A_PERSON + r" (must |may )?knows?$"),
    Rule(r"only [^.;]{1,40} (is|are) known", "unsupported NOUN"),
    Rule(r"likes", "prefer, rank highest"),
    Rule(r"speaks?|spoke|spoken", "implement, support"),
    Rule(r"thinks?|thought|believes?|hopes?", "assume, estimate"),
    Rule(r"remembers?|forgets?|forgot|forgotten", "store, cache, discard"),
    Rule(r"notices?|noticed", "detect", r"copyright notices?$"),
    Rule(r"asks?|asked|asking", "request, query, send", _A_PERSON + r" (may |can )?asks?$"),
    Rule(r"sees|saw", "read, receive, detect", _A_PERSON + r" sees$"),
    Rule(r"hears?|heard", "receive"),
    Rule(r"(live|lives|lived) (in|on|at|below|beside|here|there|with)", "is, is stored"),
    Rule(r"dies?|died|dying", "exit, crash, stop"),
    Rule(r"outlives?|outlived", "run longer than"),
    Rule(r"(sit|sits|sat|sitting)", "is"),
    Rule(r"travels?|travelled", "is sent, is stored"),
    Rule(r"obeys?|obeyed", "apply, follow"),
    Rule(r"lends?|lent|borrows?|borrowed", "provide, share"),
    Rule(r"promis(e|es|ed|ing)", "reserve, reservation, guarantee"),
    Rule(r"cares? (about|for)|minds? (if|that|being)", "depend on, use"),
    Rule(r"suffers?|suffered|complains?|complained|grumbles?", "fail, report"),
    Rule(r"innocent|guilty|honest|honestly|polite|politely|stubborn|glad|afraid|hungry", "name the property"),
    Rule(r"flatters?|flattered", "bias"),
    Rule(r"hands? (out|over)|handed (out|over)", "assign, pass"),
    Rule(r"speaks for itself|has the last word|the last word", "take precedence"),
)

# A reader must learn from the sentence which part of the system acts.
ACTORS = (
    Rule(r"nobody|nobody's|no one", "name the actor: no client, no process"),
    Rule(r"somebody|somebody's|someone|someone's|anybody|anyone|anyone's|everybody|everyone|everyone's", "name the actor"),
    Rule(r"who", "name the actor: the client, the process, the user", _A_PERSON + r"(,? who)?$", in_question=True),
    Rule(r"whoever|whomever|whom", "name the actor"),
    Rule(r"those (that|which|who|not|without|with|it|they|already)", "repeat the noun"),
    Rule(r"the (one|ones) (that|which|who|it|they)", "repeat the noun"),
    Rule(r"one's|one another's|our|ours|theirs", "name the owner"),
    Rule(r"the (latter|former)", "repeat the noun"),
    Rule(r"what", "name the thing: the value, the files, the settings", r"what (to|if)$", in_question=True),
    Rule(r"whatever", "any, all"),
    Rule(r"why (no|it|they|pools)", "the reason for"),
)

# Words that hide the plain one, or that have two meanings.
WORDS = (
    Rule(r"anew", "again"),
    Rule(r"afresh", "from the start"),
    Rule(r"mend|mends|mended|mending", "fix, repair"),
    Rule(r"tidy|tidies|tidied|tidying|tidily", "clean up"),
    Rule(r"hence|henceforth|hitherto|thereof|therein|whence|whereby|thereby|whereupon|whereof|albeit|whilst|lest|upon|thus", "so, then"),
    Rule(r"alike", "the same, equal, in the same way"),
    Rule(r"of (its|their|one's|your|our) own", "its own NOUN, separate"),
    Rule(r"at once", "immediately; concurrently; N at a time"),
    Rule(r"(at|in) work|under way|underway", "in progress, running, in flight"),
    Rule(r"(come|comes|came) to an end", "finish"),
    Rule(r"so (many|much)", "this many, up to N", r"(so (many|much) that|not so much)$"),
    Rule(r"as far as|in so far as", "if, up to, when"),
    Rule(r"for want of|in want of", "without"),
    Rule(r"in good order", "cleanly"),
    Rule(r"in place of", "instead of"),
    Rule(r"for granted", "assume"),
    Rule(r"stands?|stood|standing", "is, is stored, is listed"),
    Rule(r"(lies|lie|lay|lain) (in|on|at|below|beside|between|there|here)", "is"),
    Rule(r"(make|makes|made|making) room", "evict"),
    Rule(r"(turn|turns|turned) (away|over)", "reject, reorder"),
    Rule(r"(hold|holds|held|holding) up", "delay, block"),
    Rule(r"(hang|hangs|hung|hanging) up", "close the connection"),
    Rule(r"(go|goes|going|went|gone) away", "disconnect, exit"),
    Rule(r"(is|are|was|were) gone|is no more|are no more", "no longer exist, has exited"),
    Rule(r"(try|tries|tried|trying) again", "retry"),
    Rule(r"(throw|throws|threw|thrown) away", "discard"),
    Rule(r"(pass|passes|passed|passing) over", "skip"),
    Rule(r"(write|writes|written|wrote) over", "overwrite"),
    Rule(r"takes? back|taken back|took back|take [^.]{1,30} back", "withdraw"),
    Rule(r"takes? note|took note", "record"),
    Rule(r"overtak(e|es|en|ing)|overtook", "run before"),
    Rule(
        r"(is|are|was|were) no", "is not a", r"(there (is|are|was|were) no|(is|are|was|were) no (longer|more|less|better|faster|slower))$"
    ),
    Rule(r"where (nothing|none|there|no)", "if"),
    Rule(r"raises [^.;]{1,80}? where", "Raises ... if"),
    Rule(r"worth (its|their|a|an)", "has its own"),
    Rule(r"as (it|they) (come|comes|stand|stands)", "default, unmodified"),
    Rule(r"by itself|by themselves|of itself", "automatically, alone"),
    Rule(r"happens? to", "omit, or: if"),
    Rule(r"does the rest", "complete the run"),
    Rule(r"begun", "started"),
    Rule(r"ever", "omit"),
    Rule(r"nowhere", "never, not"),
    Rule(r"likeliest|likelier", "most likely, more likely"),
    Rule(r"to and fro", "in alternating order"),
    Rule(r"without end", "without limit"),
    Rule(r"and the like", "list the items"),
    Rule(r"kin|sister|its brother", "variant, compatible"),
    Rule(r"pace", "rate"),
    Rule(r"lifts?|lifted", "improve, remove"),
    Rule(r"the (whole )?road", "the steps"),
    Rule(r"but for", "except, apart from"),
    Rule(r"(is|are|was|were) there", "exist", in_question=True),
    Rule(r"by turns", "alternately"),
    Rule(
        r"here and now|not a thing|as (late|early|soon|few|little) as may be|next to nothing", "immediately, nothing, as late as possible"
    ),
    Rule(r"lets? go of", "release"),
    Rule(r"from \w+( \w+){0,3} on(?=[.,;:)]|$)", "starting with, after", r"from (then|now) on$"),
    Rule(
        r"(answers|bytes|candidates|instructions|line|pairs|requests|responses|row|rows|shard|steps?|tasks?|tokens|unit|MB|GB) an? "
        r"(second|minute|hour|dataset|epoch|instruction|machine|pair|process|row|run|shard|step|task|template|unit|worker)",
        "per",
    ),
    Rule(r"ground floor|at the door|doorman|way out|in the way", "name the component or the fix"),
    Rule(r"the books|its books", "state"),
    Rule(r"whoso|naught|nought|aught|betwixt|amongst|ere|nigh|yonder", "a modern word"),
)

# These begin no statement; a question may.
SENTENCE_START = (
    Rule(r"(who|whom|whoever|whose)", "name the actor"),
    Rule(r"(what|whatever|which|why)", "name the thing as the subject"),
    Rule(r"where", "If, When"),
    Rule(
        r"(each|one|another|others|none|neither|either|both|nothing|anything|something|those|some|many|few) "
        r"(is|are|was|were|has|have|had|can|cannot|may|might|must|should|will|would|does|do|did|never)",
        "name the subject",
    ),
    Rule(
        r"(each|one|another|none|neither|either|nothing|anything|something) "
        r"(takes|gives|makes|holds|keeps|needs|reads|writes|runs|gets|goes|comes|counts|starts|stops|ends|waits|uses|shows|"
        r"leaves|loads|sends|costs|fails|becomes|decides|chooses|changes|answers)",
        "name the subject",
    ),
)

BANNED = PERSONIFICATION + ACTORS + WORDS
