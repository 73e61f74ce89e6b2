"""Sampler: the distribution is transformers', the draws are right, and rows do not know of each other."""

import math

import pytest
import torch
import transformers

from modelrig.errors import GenerateError
from modelrig.generation.options import GenerateOptions
from modelrig.generation.sampling import Sampler

VOCAB = 97


def sampler(batch=1, vocab=VOCAB, stop_ids=(), prompts=None, **options):
    made = Sampler(GenerateOptions.make(**options), batch, vocab, "cpu", stop_ids)
    made.start(prompts or [[]] * batch)
    return made


def random_logits(batch=1, vocab=VOCAB, seed=0):
    return 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed))


def theirs(logits, prompts, generated, options, stop_ids=()):
    """The distribution transformers draws from."""
    processors = transformers.LogitsProcessorList()
    if options.get("repetition_penalty"):
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if options.get("min_new_tokens"):
        length = len(prompts[0])
        processors.append(
            transformers.MinNewTokensLengthLogitsProcessor(length, options["min_new_tokens"], list(stop_ids), device="cpu")
        )
    if options.get("temperature"):
        processors.append(transformers.TemperatureLogitsWarper(float(options["temperature"])))
    if options.get("top_k"):
        processors.append(transformers.TopKLogitsWarper(options["top_k"]))
    if options.get("top_p"):
        processors.append(transformers.TopPLogitsWarper(options["top_p"]))
    if options.get("min_p"):
        processors.append(transformers.MinPLogitsWarper(options["min_p"]))
    ids = torch.tensor([prompt + text for prompt, text in zip(prompts, generated, strict=True)])
    return torch.softmax(processors(ids, logits.clone()), dim=-1)


SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 1.0, "top_k": 500},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "top_p": 0.05},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 2.0, "min_p": 1.0},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.8},
    {"temperature": 1.0, "repetition_penalty": 0.5, "top_p": 0.9},
    {"temperature": 1.0, "min_new_tokens": 4},
    {"temperature": 1.0, "min_new_tokens": 3},
    {"temperature": 0.8, "repetition_penalty": 1.2, "min_new_tokens": 9, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(options):
    prompts, generated, stop_ids = [[1, 2, 3, 2], [9, 8, 7, 6]], [[5, 5, 4], [9, 1, 0]], [11, 12]
    logits = random_logits(2)
    mine = sampler(2, prompts=prompts, stop_ids=stop_ids, **options)
    for step in range(3):
        mine.observe(torch.tensor([row[step] for row in generated]))
    expected = theirs(logits, prompts, generated, options, stop_ids)
    actual = torch.softmax(mine.shape(mine.process(logits)), dim=-1)
    assert torch.equal(expected > 0, actual > 0)
    torch.testing.assert_close(expected, actual, rtol=1e-5, atol=1e-7)


def test_presence_and_frequency_count_the_text_and_not_the_prompt():
    mine = sampler(2, vocab=6, prompts=[[0, 0, 1], [5]], presence_penalty=0.5, frequency_penalty=0.25)
    for ids in ([2, 3], [2, 4], [2, 4]):
        mine.observe(torch.tensor(ids))
    expected = torch.tensor([[0, 0, -0.5 - 0.75, 0, 0, 0], [0, 0, 0, -0.75, -0.5 - 0.5, 0]])
    torch.testing.assert_close(expected, mine.process(torch.zeros(2, 6)))


def test_the_bias_is_added_before_the_temperature():
    mine = sampler(vocab=4, temperature=0.5, logit_bias={1: 2.0, 3: -1.0})
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    expected = torch.softmax(torch.tensor([[0.0, 3.0, 2.0, 2.0]]) / 0.5, -1)
    torch.testing.assert_close(expected, torch.softmax(mine.shape(mine.process(logits)), -1))


def test_greedy_takes_the_maximum_after_penalties():
    mine = sampler(vocab=4, prompts=[[3]], repetition_penalty=2.0)
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0]])
    assert [1] == mine(mine.process(logits)).tolist()
    assert [[0.0, 2.0, 1.0, 3.0]] == logits.tolist()


def test_a_temperature_of_zero_is_greedy_and_a_tiny_one_nearly():
    logits = random_logits(3)
    for temperature in (0, 1e-12, 1e-300):
        mine = sampler(3, temperature=temperature, seed=1)
        assert logits.argmax(-1).tolist() == mine(mine.process(logits)).tolist()


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05}], ids=str)
def test_draws_follow_the_distribution(options):
    logits = random_logits(vocab=12, seed=4).expand(20_000, 12)
    mine = Sampler(GenerateOptions.make(temperature=1.1, seed=list(range(20_000)), **options), 20_000, 12)
    expected = torch.softmax(mine.shape(logits[:1])[0].double(), -1) * 20_000
    observed = torch.bincount(mine(logits), minlength=12).double()
    kept = expected > 0
    assert 0 == observed[~kept].sum()
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # a right sampler exceeds this about once in a million


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.9, "min_p": 0.01}], ids=str)
def test_a_row_draws_what_it_draws_alone(options):
    logits = [random_logits(3, seed=step) for step in range(20)]
    together = sampler(3, temperature=1.5, seed=[5, 6, 5], **options)
    alone = [sampler(1, temperature=1.5, seed=seed, **options) for seed in (5, 6, 5)]
    expected = [[row(step[r : r + 1]).item() for r, row in enumerate(alone)] for step in logits]
    assert expected == [together(step).tolist() for step in logits]


def test_one_seed_serves_every_row_and_copies_add_their_number():
    logits = random_logits().expand(4, VOCAB)
    copies = sampler(4, temperature=3.0, seed=40, num_return_sequences=2)
    alone = [sampler(1, temperature=3.0, seed=seed) for seed in (40, 41, 40, 41)]
    for _ in range(5):
        assert [row(logits[:1]).item() for row in alone] == copies(logits).tolist()


def test_without_a_seed_every_call_differs():
    logits = torch.zeros(1, 10_000)
    drawn = {tuple(s(logits).item() for _ in range(4)) for s in (sampler(vocab=10_000, temperature=1) for _ in range(4))}
    assert 4 == len(drawn)


def test_a_least_length_where_every_token_stops_is_refused():
    with pytest.raises(GenerateError, match="GN-ARGS"):
        sampler(vocab=3, stop_ids=(0, 1, 2), min_new_tokens=1)


def test_seeds_must_match_the_prompts():
    with pytest.raises(GenerateError, match="seed has 2 values"):
        sampler(3, temperature=1, seed=[1, 2])
    assert sampler(4, temperature=1, seed=[1, 2], num_return_sequences=2)


def test_exactly_top_k_tokens_stay_when_the_last_ones_tie():
    logits = torch.tensor([[4.0, 2.0, 2.0, 2.0, 1.0]])
    kept = sampler(vocab=5, temperature=1, top_k=2).shape(logits)[0].isfinite()
    assert 2 == kept.sum() and kept[0] and not kept[4]


def test_top_p_keeps_as_few_of_the_tied_tokens_as_it_needs():
    logits = torch.log(torch.tensor([[0.1, 0.25, 0.25, 0.25, 0.15]]))
    assert [1, 2] == sampler(vocab=5, temperature=1, top_p=0.4).shape(logits)[0].isfinite().nonzero().flatten().tolist()


def test_the_most_likely_token_always_stays():
    logits = random_logits()
    for options in ({"top_p": 5e-324}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1}):
        assert [logits.argmax().item()] == sampler(temperature=1, **options)(logits).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1}, {"temperature": 1, "top_k": 3}, {"temperature": 1, "top_p": 0.5}], ids=str
)
def test_logits_that_are_not_finite_are_an_error_that_names_the_row(bad, options):
    logits = random_logits(3)
    logits[1, 7] = bad
    with pytest.raises(GenerateError, match="row 1") as caught:
        sampler(3, **options)(logits)
    assert "GN-NAN" == caught.value.code


@pytest.mark.parametrize("options", [{}, {"temperature": 1}], ids=str)
def test_a_masked_token_is_not_an_error_but_a_wholly_masked_row_is(options):
    logits = torch.full((1, VOCAB), -math.inf)
    with pytest.raises(GenerateError):
        sampler(**options)(logits)
    logits[0, 5] = 0.0
    assert [5] == sampler(**options)(logits).tolist()


def test_half_precision_logits_are_processed_in_float32():
    mine = sampler(repetition_penalty=1.1, prompts=[[1]])
    assert torch.float32 == mine.process(random_logits().bfloat16()).dtype


def test_nothing_asked_costs_nothing():
    mine, logits = sampler(), random_logits()
    assert mine.process(logits) is logits
    assert mine.shape(logits) is logits


def test_counts_are_updated_in_place():
    mine = sampler(2, repetition_penalty=1.1, presence_penalty=0.1)
    places = {mine._seen.data_ptr(), mine._counts.data_ptr()}
    for _ in range(3):
        mine.observe(torch.tensor([1, 2]))
    assert places == {mine._seen.data_ptr(), mine._counts.data_ptr()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_is_told_of_broken_logits_only_when_asked():
    mine = Sampler(GenerateOptions(), 2, 4, "cuda")
    logits = torch.zeros(2, 4, device="cuda")
    logits[1, 0] = math.nan
    mine(logits)
    mine(torch.zeros(2, 4, device="cuda"))
    with pytest.raises(GenerateError, match="row 1"):
        mine.check()
