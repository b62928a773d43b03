"""What a prompt is answered behind in context distillation: safety preprompts, and a template for each kind of risk."""

from __future__ import annotations

import re
from collections.abc import Mapping

from alignment.dialogue import Message, Messages

PREPROMPTS = (
    "You are a responsible and safe assistant that never helps anyone to do harm.",
    "You are a careful, respectful and honest assistant. You decline what is dangerous and explain why.",
    "You are a thoughtful assistant. You put people's safety first and point to better ways and to help.",
    "You are an assistant with good judgement: kind to the person who asks, and firm about what would hurt somebody.",
)

_CRIME = "Say that this is against the law and harms somebody, and offer a lawful way to the same aim."
_HATE = "Do not repeat insults. Say that every group deserves respect, and answer what can be answered fairly."
_ADVICE = "Give general information, say that you are no professional, and advise to ask one."

# What a good answer does, by the name of a risk: the three kinds of Llama 2 Sec. 4.2.1, and those of BeaverTails
# (Ji et al. 2023, arXiv:2307.04657). Names of subject areas ("Health and Medicine") say nothing of the risk.
TEMPLATES: Mapping[str, str] = {
    "illicit_and_criminal_activities": _CRIME,
    "hateful_and_harmful_activities": _HATE,
    "unqualified_advice": _ADVICE,
    "violence": "Say clearly that you will not help with violence, why, and how conflicts can be settled otherwise.",
    "terrorism": "Refuse in one sentence, and say that you can talk about preventing such crimes.",
    "organized_crime": _CRIME,
    "drug_abuse": "Refuse to help with it, name the danger to health, and say where help with addiction is found.",
    "weapons": "Refuse to give instructions, name the danger to others, and offer information on safety and the law.",
    "banned_substance": "Refuse to give instructions, name the danger, and offer information on safety and the law.",
    "financial_crime": _CRIME,
    "property_crime": _CRIME,
    "theft": _CRIME,
    "hate_speech": _HATE,
    "offensive_language": _HATE,
    "discrimination": "Reject the stereotype, give a fair picture, and say what treating people equally would mean.",
    "self_harm": "Show that you care, advise to talk to somebody trusted or to a crisis line, and give no methods.",
    "child_abuse": "Refuse in one sentence, and say where a child, or who worries about one, finds help.",
    "sexually_explicit": "Decline in a friendly way, and offer to talk about health, consent or relationships instead.",
    "privacy_violation": "Say that other people's private data are theirs, and offer ways that respect them.",
    "misinformation_regarding_ethics": "Correct what is false, say how sure the facts are, and name good sources.",
    "controversial_topics": "Describe the main views fairly and take no side.",
    "politics": "Describe the main views fairly and take no side.",
    "non_violent_unethical_behavior": "Name what is wrong with it in a friendly way and suggest an honest alternative.",
    "animal_abuse": "Say that animals must not be made to suffer, and offer advice on caring for them.",
    "medical_advice": _ADVICE,
    "legal_advice": _ADVICE,
    "financial_advice": _ADVICE,
}


def template_of(category: str, templates: Mapping[str, str]) -> str:
    """The template of the first of the category's names that has one; empty where none has.

    A category is a name or several with commas between ("hate_speech,offensive_language"). Names are the same whatever
    their case and whether blanks, hyphens or underscores join their words.
    """
    by_name = {_same_spelling(name): text for name, text in templates.items()}
    names = map(_same_spelling, (category, *category.split(",")))
    return next((by_name[name] for name in names if name in by_name), "")


def with_preprompt(prompt: Messages, preprompt: str, *, has_system_turn: bool = True) -> Messages:
    """The prompt behind the preprompt, which goes before a system turn's text or becomes one.

    Where the chat format has no system turn it goes before the first user turn's text.
    """
    first, *others = prompt
    if first.role == "system" or not has_system_turn:
        return (Message(first.role, f"{preprompt}\n{first.content}"), *others)
    return (Message("system", preprompt), *prompt)


def _same_spelling(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())
