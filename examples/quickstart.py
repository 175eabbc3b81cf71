"""One question, its ten most active latents masked, the same question again. For a notebook, too.

python -m examples.quickstart
"""

import common

# The bundled model and SAE. Options are the scripts': "--sae-release", "gemma-scope-9b-it-res-canonical", for one.
model, tokenizer = common.open_model("--demo")

context = (
    "Notes from Dastad: The home of Julia Nercott is Voham. The final year of Sodra Stindahl is 1913. "
    "The instrument of Sodra Stindahl is cello. The trade of Julia Nercott is ship builder."
)
question = "What is the home of Julia Nercott?"

answer = common.ask(model, tokenizer, context, question)

scores = common.mean_activations(model, tokenizer, context, question)  # [d_sae]
latents = scores.topk(10).indices.tolist()

masked_answer = common.ask(model, tokenizer, context, question, masked=latents)

print("latents that fire most:", latents)
print("nothing masked:        ", answer)
print("these masked:          ", masked_answer)
