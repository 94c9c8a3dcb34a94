"""What the task files beside this one do to a document beyond a template: the harness's own functions."""

from lm_eval.tasks.hellaswag.utils import process_docs as hellaswag_documents
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results as wikitext_results
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer as wikitext_text
from lm_eval.tasks.winogrande.preprocess_winogrande import doc_to_choice as winogrande_beginnings
from lm_eval.tasks.winogrande.preprocess_winogrande import doc_to_target as winogrande_ending
from lm_eval.tasks.winogrande.preprocess_winogrande import doc_to_text as winogrande_choice

__all__ = [
    "hellaswag_documents",
    "wikitext_results",
    "wikitext_text",
    "winogrande_beginnings",
    "winogrande_choice",
    "winogrande_ending",
]
