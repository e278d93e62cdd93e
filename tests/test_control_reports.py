"""What controls must show, by number, and the test of each: T36 and T44 to T54 are failures of other programs that
were reported in public; the rest is what steering by pictures promises here.

=====  ==================================================  ====================================================
no.    what is shown                                       file and test, without their `test_`s
=====  ==================================================  ====================================================
T36    layers of an IP-Adapter: down, up, middle           checkpoints/controls/ip_adapters.what_diffusers_makes_of_it
T36    the middle before the up blocks is seen             checkpoints/controls/ip_adapters.the_middle_before_the_up_blocks_is_another_order
T44    guess mode steers every picture of a batch          parity_controls.t44_guess_mode_steers_every_picture_of_a_batch
T45    pictures of a batch are those drawn alone           parity_controls.t45_pictures_of_a_batch_are_those_that_are_drawn_alone
T46    two prompts, two nets, each its own hint            parity_controls.t46_two_prompts_and_two_nets_have_each_its_own_hint
T46    a hint for each picture                             runtime/hints.t46_every_picture_has_its_own_hint
T47    hints of 0 to 255 or of -1 to 1 are refused         runtime/hints.t47_pictures_that_are_none
T48    outputs scale with the strength exactly             parity_controls.t48_outputs_scale_with_the_strength_exactly
T49    SDXL's guess mode: vectors of the prompt's half     parity_sdxl.t49_in_guess_mode_a_controlnet_reads_the_conditional_half
T50    inpainting: -1 exactly where the mask is over 0.5   runtime/hints.t50_inpainting_is_minus_one_exactly_where_the_mask_is_over_a_half
T50    a mask of another size                              runtime/hints.t50_an_uploaded_mask_of_another_size
T51    start and end: the steps are diffusers'             runtime/control.the_part_of_the_steps_is_diffusers
T51    of a picture: shares of the steps that are run      parity_controls.from_a_picture
T52    a second, larger pass is steered too                parity_controls.t52_a_second_larger_pass_is_steered_too
T53    height and width are not exchanged                  parity_controls.t53_height_and_width_are_not_exchanged
T53    the residuals of published nets                     export/controlnet.the_residuals_of_published_nets
T54    outputs beyond fp16 are refused by the net's name   demo/controls.t54_a_net_whose_outputs_exceed_fp16_is_refused_by_name
T54    a picture that is not finite names its controls     demo/controls.t54_a_picture_that_is_not_finite_names_its_controls
files  layouts of ControlNets                              checkpoints/controls/controlnets.a_file
files  pickles are converted                               checkpoints/controls/refused.pickles_are_converted
files  unions                                              checkpoints/controls/controlnets.a_union
files  differences                                         checkpoints/controls/with_base.a_difference
files  control-LoRAs                                       checkpoints/controls/with_base.a_control_lora
files  what changes a checkpoint draws as in diffusers     parity_completed_controls.a_change_of_the_checkpoint
files  every architecture has a template                   checkpoints/shipped_templates.every_architecture_has_its_templates
files  T2I-Adapters: full, light, XL                       checkpoints/controls/t2i_adapters.every_layout
files  FaceID, LLLite, XS and others, by name              checkpoints/controls/refused.a_file
draws  one and two nets x tasks x guess mode               parity_steered_tasks.two_nets
draws  the same without guidance                           parity_steered_tasks.two_nets_without_guidance
draws  beside a model for inpainting                       parity_steered_tasks.an_inpainting_model_shows_a_controlnet_its_latent_alone
draws  unions                                              parity_unions.two_pictures
draws  balance modes of AUTOMATIC1111                      runtime/control.soft_weights_of_a1111
draws  nets that average, as shuffle                       parity_controls.a_net_that_averages
draws  the base is steered, the refiner is not             parity_sdxl.the_base_is_steered_and_the_refiner_is_not
draws  T2I-Adapters                                        parity_t2i_adapters.text_to_image
draws  T2I-Adapters: light, and two at once                parity_t2i_adapters.a_light_one_of_one_channel_and_two_at_once
draws  IP-Adapters at 0, 0.6 and 1                         parity_image_prompts.every_kind_at_scales_of_0_06_and_1
draws  IP-Adapters: several pictures, two adapters         parity_image_prompts.several_pictures_and_two_adapters
draws  IP-Adapters: masks                                  parity_image_prompts.masks
draws  IP-Adapters: strengths of blocks                    parity_image_prompts.strengths_of_blocks
draws  all kinds in one request                            demo/all_together.one_request_with_all_of_them
tiles  redrawn larger with a tile ControlNet               parity_tiles.with_a_tile_controlnet
tiles  no seams                                            runtime/tiles.seams_are_within_what_the_picture_has_elsewhere
tiles  no seams beside a tile ControlNet                   runtime/tiles.seams_beside_a_controlnet_that_reads_the_picture
maps   canny is OpenCV's                                   runtime/canny.gradients
maps   what takes a net says what to feed                  runtime/preparations.preparations_that_take_a_net_say_what_to_give
words  options of the command line                         cli/generate_options.controls
words  ranges by name                                      runtime/control.what_no_control_can_be
words  AUTOMATIC1111's text                                demo/controls.pictures_say_their_controls_as_automatic1111s_extension_reads_them
words  a picture is drawn again                            parity_controls.records_and_redrawing
runs   once a picture: hints, keys and values              parity_controls.hints_are_computed_once_a_picture
runs   no control, no change of a bit                      parity_controls.strength_0_is_no_control_to_the_byte
runs   zeros change no bit of the UNet's graph             export/controls.zeros_change_no_bit
runs   engines for TensorRT-RTX without a GPU              cli/build.controls_are_built_with_the_graph_that_takes_them
runs   one engine with and without                         runtime/tensorrt_pictures.one_engine_draws_with_and_without_controls
runs   one engine with several                             runtime/tensorrt_pictures.several_controlnets_by_the_same_engine
runs   LoRA, embedding, ControlNet and inpainting at once  runtime/tensorrt_pictures.everything_in_one_request
runs   on a device what the host draws                     runtime/device_controls.all_kinds_of_controls_draw_what_the_host_draws
runs   residuals stay on the device                        runtime/device_controls.residuals_stay_on_the_device
runs   the ledger has controls                             runtime/device_controls.memory_of_controls_is_known
runs   the ladder has controls                             runtime/device_controls.memory_that_a_net_of_a_control_lacks_is_given_up_elsewhere
demo   shapes follow edges, colours the prompt             demo/controls.shapes_follow_edges_and_colours_follow_prompts
demo   at most 1.5 MB each                                 demo/controls.they_are_small_and_in_half_precision
demo   strength 0 is no control                            demo/controls.at_strength_0_it_is_the_same_to_the_byte
demo   pictures of the guide, by its commands              readme.the_pictures_are_made_by_the_commands_shown
=====  ==================================================  ====================================================
"""  # noqa: E501

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
NUMBERS = [36, *range(44, 55)]


def test_every_number_has_a_test_that_exists() -> None:
    _, _, rows, _ = re.split(r"^=====.*$", __doc__ or "", flags=re.MULTILINE)
    lines = rows.strip().splitlines()
    found = [re.fullmatch(r"(\w+) +\S.* ([\w/]+)\.(\w+)", line) for line in lines]
    assert all(found), "a line that is not read"
    named = [match.groups() for match in found if match]
    numbers = {int(number[1:]) for number, _, _ in named if number.startswith("T")}
    assert sorted(numbers) == NUMBERS
    for number, file, name in named:
        folder, _, stem = file.rpartition("/")
        source = (TESTS / folder / f"test_{stem}.py").read_text(encoding="utf-8")
        tests = {item.name for item in ast.parse(source).body if isinstance(item, ast.FunctionDef)}
        assert f"test_{name}" in tests, f"{number}: {file}.{name}"
