"""Which output of a block is which argument of the next one, learned from plain calls."""

from __future__ import annotations

import pytest
import torch

from sgl_diffusion_accel.caching.blocks.wiring import Wiring, elements
from sgl_diffusion_accel.errors import UnsupportedModelError

IMAGE, TEXT, TIME = (2, 16, 8), (2, 5, 8), (2, 8)


def tensor(shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def wiring(*names):
    return Wiring(names, "ToyTransformer.blocks")


def test_elements_are_the_parts_of_an_output():
    one, two = tensor(IMAGE), tensor(TEXT)
    assert elements(one) == (one,)
    assert elements((one, two)) == (one, two)
    assert elements([one, None]) == (one, None)


def test_argument_is_found_by_position_and_by_name():
    one, two = object(), object()
    known = Wiring(["hidden_states", "temb"], "ToyTransformer.blocks")
    assert known.get(((one,), {"temb": two}), 0) is one
    assert known.get(((one,), {"temb": two}), "temb") is two
    assert known.get(((one, two), {}), "temb") is two
    assert known.get(((), {"hidden_states": one}), 0) is one


def test_output_is_recognised_as_the_next_block_s_positional_argument():
    learned, hidden = wiring("hidden_states", "temb"), tensor(IMAGE)
    learned.observe(hidden, ((hidden, tensor(TIME)), {}))
    assert learned.complete
    assert learned.keys == [0]
    assert learned.name(0) == "hidden_states"


def test_outputs_are_recognised_in_any_order_and_by_name():
    """FLUX returns (encoder, hidden) and takes them by name."""
    learned, hidden, text = wiring(), tensor(IMAGE), tensor(TEXT)
    learned.observe(
        (text, hidden), ((), {"hidden_states": hidden, "encoder_hidden_states": text, "temb": tensor(TIME)})
    )
    assert learned.complete
    assert learned.keys == ["encoder_hidden_states", "hidden_states"]


def test_output_that_is_none_feeds_nothing_and_leaves_nothing_open():
    """The last block of Stable Diffusion 3 returns (None, hidden)."""
    learned, hidden = wiring(), tensor(IMAGE)
    learned.observe((None, hidden), ((), {"hidden_states": hidden}))
    assert learned.complete
    assert learned.keys == [None, "hidden_states"]


def test_equal_tensors_are_not_the_same_tensor():
    learned, hidden = wiring(), tensor(IMAGE)
    learned.observe(hidden, ((), {"hidden_states": hidden.clone()}))
    assert not learned.complete


def test_what_one_pair_of_calls_does_not_show_another_may():
    """A control residual was added to the hidden states between the first two blocks, not between the next two."""
    learned, hidden, text = wiring(), tensor(IMAGE), tensor(TEXT)
    learned.observe((text, hidden), ((), {"hidden_states": hidden + 1, "encoder_hidden_states": text}))
    assert not learned.complete
    learned.observe((text, hidden), ((), {"hidden_states": hidden, "encoder_hidden_states": text + 1}))
    assert learned.complete
    assert learned.keys == ["encoder_hidden_states", "hidden_states"]


def test_output_that_was_replaced_is_found_by_its_shape():
    learned, hidden, text = wiring(), tensor(IMAGE), tensor(TEXT)
    call = ((), {"hidden_states": hidden, "encoder_hidden_states": text, "temb": tensor(TIME)})
    learned.observe((text, hidden), ((), {"hidden_states": hidden + 1, "encoder_hidden_states": text}))
    learned.settle(call, (text.clone(), hidden.clone()))
    assert learned.complete
    assert learned.keys == ["encoder_hidden_states", "hidden_states"]


def test_single_block_is_settled_by_shape_alone():
    learned = wiring("x", "context")
    learned.settle(((tensor(IMAGE), tensor(TEXT)), {"temb": tensor(TIME)}), (tensor(TEXT), tensor(IMAGE)))
    assert learned.keys == [1, 0]


def test_settling_leaves_what_was_seen_as_it_is():
    learned, hidden, text = wiring(), tensor(IMAGE), tensor(IMAGE)
    learned.observe((text, hidden), ((), {"b": hidden, "a": text}))
    learned.settle(((), {"a": tensor(IMAGE), "b": tensor(IMAGE)}), (text, hidden))
    assert learned.keys == ["a", "b"]


def test_dtype_tells_arguments_of_one_shape_apart():
    learned = wiring("one", "two")
    learned.settle(((tensor(IMAGE, torch.bfloat16), tensor(IMAGE)), {}), tensor(IMAGE))
    assert learned.keys == [1]


def test_names_of_streams_tell_arguments_of_one_shape_apart():
    learned = wiring("hidden_states", "rotary")
    learned.settle(((tensor(IMAGE), tensor(IMAGE)), {}), tensor(IMAGE))
    assert learned.keys == [0]


def test_single_output_prefers_the_hidden_states_to_another_stream():
    learned = wiring("encoder_hidden_states", "hidden_states")
    learned.settle(((tensor(IMAGE), tensor(IMAGE)), {}), tensor(IMAGE))
    assert learned.keys == [1]


def test_ambiguous_outputs_are_refused_with_what_was_seen():
    learned = wiring("alpha", "beta")
    with pytest.raises(UnsupportedModelError) as error:
        learned.settle(((tensor(IMAGE), tensor(IMAGE)), {}), tensor(IMAGE))
    message = str(error.value)
    assert "[2, 16, 8]" in message
    assert "ToyTransformer.blocks" in message
    assert "alpha" in message
    assert "beta" in message


def test_output_without_an_argument_of_its_shape_is_refused():
    with pytest.raises(UnsupportedModelError, match="ToyTransformer"):
        wiring("hidden_states").settle(((tensor(TEXT),), {}), tensor(IMAGE))


def test_two_outputs_never_share_an_argument():
    learned = wiring("hidden_states", "encoder_hidden_states")
    with pytest.raises(UnsupportedModelError):
        learned.settle(((tensor(IMAGE), tensor(TEXT)), {}), (tensor(IMAGE), tensor(IMAGE)))


def test_keys_are_kept_apart_for_position_zero_and_no_key():
    """Position 0 is a key, though it is false."""
    learned, hidden = wiring("hidden_states"), tensor(IMAGE)
    learned.observe(hidden, ((hidden,), {}))
    learned.settle(((tensor(IMAGE), tensor(IMAGE)), {}), tensor(IMAGE))
    assert learned.keys == [0]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("encoder_hidden_states", "hidden_states", 1),
        ("hidden_states", "encoder_hidden_states", 0),
        ("und_seq", "gen_seq", 1),
        ("hidden_states", "audio_hidden_states", 0),
        ("text_embed", "visual_embed", 1),
    ],
)
def test_the_picture_is_found_by_its_argument_s_name(first, second, expected):
    learned = wiring()
    outputs = (tensor(TEXT), tensor(TEXT))
    learned.observe(outputs, ((), {first: outputs[0], second: outputs[1]}))
    assert learned.hidden(outputs) == expected


def test_the_picture_is_the_largest_output_where_no_name_tells():
    learned = wiring("a", "b")
    outputs = (tensor(TEXT), tensor(IMAGE))
    learned.observe(outputs, (outputs, {}))
    assert learned.hidden(outputs) == 1


def test_the_picture_is_found_beside_an_output_that_is_none():
    learned = wiring("a", "b")
    outputs = (None, tensor(IMAGE))
    learned.observe(outputs, ((None, outputs[1]), {}))
    assert learned.hidden(outputs) == 1


def test_argument_without_a_known_name_is_named_by_its_position():
    assert wiring("hidden_states").name(3) == "3"
    assert wiring("hidden_states").name("temb") == "temb"
