"""One question, its ten most active latents masked, the same question again. In a notebook it runs as it is.

python -m examples.quickstart
"""

from examples import interactive

# The bundled model and SAE. Options are the scripts': "--sae-release", "gemma-scope-9b-it-res-canonical", for one.
model, tokenizer = interactive.open_model("--demo")

context = (
    "Notes from Brilby: The home of Sodra Ginwick is Fistad. The pet of Sodra Ginwick is black parrot. "
    "The instrument of Jiren Jerson is banjo. The birthplace of Sodra Ginwick is Wamere."
)
question = "What is the home of Sodra Ginwick?"

answer = interactive.ask(model, tokenizer, context, question)

scores = interactive.mean_activations(model, tokenizer, context, question)  # [d_sae]
latents = scores.topk(10).indices.tolist()

masked_answer = interactive.ask(model, tokenizer, context, question, masked=latents)

print("latents that fire most:", latents)
print("nothing masked:        ", answer)
print("these masked:          ", masked_answer)
