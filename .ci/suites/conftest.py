"""What transformers' testers assume and we do not do, test by test, with the line of 5.24 that assumes it.

Each of these must fail: one that passes is an error too, and leaves the list.
"""

import pytest

ASSUMED = {
    # test_modeling_common.py
    "test_sdpa_can_dispatch_composite_models": "4074: the vision tower is a PreTrainedModel with a config of its own",
    "test_model_rope_scaling_from_config": "6440: random text holds no image token, and 1.5 times the positions fit",
    "TestHook::test_inputs_embeds": "3253: a language model that reads ids takes embeddings alone, images among them",
    "TestHook::test_tp_plan_matches_params": "5134: Gemma 4's own plan names experts that this config switches off",
    # test_image_processing_common.py, test_video_processing_common.py
    "test_call_numpy_4_channels": "807 and 436: images of four channels, or an axis of channels in the output",
    "test_call_sample_frames": "352: frames are the second axis of the output; ours are packed patches",
    "test_video_processor_from_dict_with_kwargs": "136: a video processor has size and crop_size; the plan decides",
    # test_processing_common.py
    "test_apply_chat_template_decoded_video": "1362: one row of pixels a video",
    "test_apply_chat_template_video": "1463: parameterized drops require_torchcodec; videos are on the network",
}


def pytest_collection_modifyitems(items):
    for item in items:
        name = f"{item.cls.__name__}::{item.name}"
        for assumed, reason in ASSUMED.items():
            if assumed in name and not (assumed == "test_inputs_embeds" and "TestHook" not in name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
