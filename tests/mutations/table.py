"""Faults to put into what is kept, one for each promise of its mechanism, and the test that turns red."""

from typing import NamedTuple

GUARDS = "ipa_kernels/integration/guards.py"
KNOWN = "ipa_kernels/integration/known_modules.py"
MODEL_GUARDS = "ipa_kernels/integration/model_guards.py"
UNET_GUARD = "ipa_kernels/integration/unet_guard.py"
CACHE = "ipa_kernels/integration/conditioning_cache.py"
PREPARED = "ipa_kernels/integration/prepared_call.py"
RUNNING = "ipa_kernels/integration/running_step.py"
STEPS = "ipa_kernels/integration/steps.py"
LOCK = "ipa_kernels/integration/step_lock.py"
STATIC = "ipa_kernels/integration/static_storage.py"
HOOKS = "ipa_kernels/integration/hooks.py"
IMAGES = "ipa_kernels/integration/image_projection.py"
FUSED = "ipa_kernels/integration/processors/fused.py"

OF_GUARDS = "tests/integration/test_guards.py::"
OF_CACHE = "tests/integration/test_conditioning_cache.py::"
OF_KEPT = "tests/integration/test_kept.py::"
OF_CALL = "tests/integration/test_prepared_call.py::"
OF_CLOSED = "tests/integration/test_closed_steps.py::"
OF_THREADS = "tests/integration/test_threads.py::"
OF_INTERRUPTS = "tests/integration/test_interrupts.py::"
OF_PATCHES = "tests/integration/test_patches.py::"
OF_PREPARE = "tests/integration/test_prepare_pipeline.py::"
OF_EDITS = "tests/integration/test_edits.py::"
OF_MEMORY = "tests/integration/test_flat_memory.py::"

INTRUDER = f"{OF_CLOSED}test_what_comes_between_two_steps_and_edits_weights_in_the_middle_of_one"
BETWEEN = f"{OF_CLOSED}test_what_is_changed_between_two_closed_steps"


class Mutation(NamedTuple):
    """name: what is broken; file: where; old: a text that occurs there once; new: in its place; test: that turns red."""

    name: str
    file: str
    old: str
    new: str
    test: str


# values and entries
VALUES = [
    Mutation(
        "any tensor at the address of a source is taken for it",
        GUARDS, "same = self.tensor() is tensor", "same = True",
        f"{OF_GUARDS}test_another_tensor_on_the_same_memory_is_another",
    ),
    Mutation(
        "a source that is written to is not noticed",
        GUARDS, "same and self.version == tensor._version and", "same and",
        f"{OF_CACHE}test_a_change_in_the_middle_of_a_generation[refill_text]",
    ),
    Mutation(
        "a source whose data lies elsewhere is not noticed",
        GUARDS, " and self.address == tensor.data_ptr()", "",
        f"{OF_CACHE}test_a_change_in_the_middle_of_a_generation[text_data]",
    ),
    Mutation(
        "a value keeps its source alive",
        GUARDS, "self.tensor = weakref.ref(tensor, forget)", "self.tensor = lambda: tensor",
        f"{OF_MEMORY}test_the_tensors_of_a_generation_die_with_it",
    ),
    Mutation(
        "an entry keeps its prompt alive",
        CACHE, "entry.inputs = [weakref.ref(tensor, forget) for tensor in tensors]",
        "entry.inputs = [lambda tensor=tensor: tensor for tensor in tensors]",
        f"{OF_MEMORY}test_the_tensors_of_a_generation_die_with_it",
    ),
    Mutation(
        "a guard that no longer matched matches again",
        GUARDS, "                    self.valid = False\n                    break", "                    return False",
        f"{OF_GUARDS}test_a_weight_that_was_put_back_does_not_bring_a_guard_back",
    ),
    Mutation(
        "a value is found again after someone wrote to it",
        CACHE, "return self.guards == guards and self.versions == [tensor._version for tensor in self.tensors()]",
        "return self.guards == guards",
        f"{OF_CACHE}test_a_hook_that_writes_to_the_image_tokens",
    ),
    Mutation(
        "a value is kept although its weights changed while it was computed",
        CACHE, "elif all(guard.check() for guard in guards):", "else:",
        f"{OF_THREADS}test_a_weight_that_is_put_back_after_a_value_was_computed_with_another",
    ),
    Mutation(
        "a value is found whatever computed it",
        CACHE, "return self.guards == guards and", "return",
        f"{OF_CACHE}test_a_change_in_the_middle_of_a_generation[edit_text_weight]",
    ),
    Mutation(
        "attributes of FaceID-Plus are not guarded",
        KNOWN, "return Same(embeds), embeds._version, embeds.data_ptr(), module.shortcut, module.shortcut_scale", "return None",
        f"{OF_CACHE}test_the_attributes_of_faceid_plus[shortcut_scale]",
    ),
    Mutation(
        "values belong to a condition: one key over text, images and masks",
        CACHE, "key = key, entry.settings", "key = key, id(entry)",
        f"{OF_KEPT}test_a_prompt_tensor_for_each_tile",
    ),
    Mutation(
        "the timestep is read",
        HOOKS, "(step.modes, stream, step.lora_scale)", '(step.modes, stream, step.lora_scale, str(named.get("timestep")))',
        f"{OF_KEPT}test_any_loop_computes_once[numbers]",
    ),
    Mutation(
        "an entry that is not used is never dropped",
        CACHE, "UNUSED = 16", "UNUSED = 16_000",
        f"{OF_KEPT}test_a_condition_that_many_steps_did_not_have[17-False]",
    ),
    Mutation(
        "an entry is dropped when the next one comes",
        CACHE, "UNUSED = 16", "UNUSED = 0",
        f"{OF_KEPT}test_a_condition_that_many_steps_did_not_have[16-True]",
    ),
    Mutation(
        "as many entries are kept as come",
        CACHE, "ENTRIES = 8", "ENTRIES = 800",
        f"{OF_MEMORY}test_what_a_user_comes_back_to_is_bounded_too",
    ),
]  # fmt: skip

# what a condition contains, and what it does not
CONDITIONS = [
    Mutation(
        "the scale of LoRAs is not in the condition",
        HOOKS, "(step.modes, stream, step.lora_scale)", "(step.modes, stream)",
        f"{OF_KEPT}test_the_scale_of_loras_is_of_the_condition",
    ),
    Mutation(
        "a step that scales LoRAs is closed",
        HOOKS, " and step.lora_scale == 1", "",
        f"{OF_CLOSED}test_a_step_that_scales_loras_is_open",
    ),
    Mutation(
        "the CUDA stream is not in the condition",
        HOOKS, "(step.modes, stream, step.lora_scale)", "(step.modes, step.lora_scale)",
        f"{OF_CACHE}test_what_was_computed_on_another_stream_is_not_found",
    ),
    Mutation(
        "autocast is no mode",
        STEPS,
        "_has_autocast(device_type) and torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)",
        "False",
        f"{OF_CACHE}test_autocast_on_and_off",
    ),
    Mutation(
        "TF32 is no mode",
        STEPS, 'device_type == "cuda" and torch.backends.cuda.matmul.fp32_precision', "False",
        f"{OF_GUARDS}test_tf32_is_a_mode_of_cuda",
    ),
    Mutation(
        "the level of forward AD is no mode",
        STEPS, "torch.autograd.forward_ad._current_level", "None",
        f"{OF_GUARDS}test_modes_are_told_apart",
    ),
    Mutation(
        "residuals of a ControlNet are in the condition",
        HOOKS, 'inputs = [named.get("encoder_hidden_states")]',
        'inputs = [named.get("encoder_hidden_states"), named.get("mid_block_additional_residual")]',
        f"{OF_KEPT}test_what_changes_in_every_step_is_no_condition",
    ),
]  # fmt: skip

# what makes a step closed, and what is looked at before one
CLOSED = [
    Mutation(
        "a hook somewhere in the UNet leaves a step closed",
        MODEL_GUARDS, "(_has_hooks(unet) or have_hooks(self._own))", "_has_hooks(unet)",
        f"{INTRUDER}[a_hook]",
    ),
    Mutation(
        "a hook that was put in place by hand leaves a step closed",
        GUARDS, "return any(map(_HOOKS, own)) or any(map(_PRE_HOOKS, own))", "return any(map(_PRE_HOOKS, own))",
        f"{INTRUDER}[hooks_replaced]",
    ),
    Mutation(
        "a hook on the UNet leaves a step closed",
        MODEL_GUARDS, "(_has_hooks(unet) or have_hooks(self._own))", "have_hooks(self._own)",
        f"{INTRUDER}[a_hook_on_the_unet]",
    ),
    Mutation(
        "hooks on every module are not noticed",
        CACHE, "if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]", "if False:",
        f"{INTRUDER}[a_hook_on_every_module]",
    ),
    Mutation(
        "a forward of a module's own is not noticed",
        MODEL_GUARDS, "if [*map(len, self._own), len(vars(unet))] != self._sizes or", "if",
        f"{INTRUDER}[a_forward_of_its_own]",
    ),
    Mutation(
        "a function in the place of a module's own is not foreign",
        MODEL_GUARDS, "for name in _overridden(module):", "for name in ():",
        f"{INTRUDER}[what_call_module_calls]",
    ),
    Mutation(
        "a class that is patched between two steps is not noticed",
        MODEL_GUARDS,
        "return all(len(now) == len(known) and all(map(operator.is_, now.values(), known)) for now, known in self._classes)\n\n"
        "    def _find", "return True\n\n    def _find",
        f"{INTRUDER}[ResnetBlock2D_forward]",
    ),
    Mutation(
        "a module of another class is not noticed",
        MODEL_GUARDS, " or list(map(type, self._modules)) != self._kinds:", ":",
        f"{INTRUDER}[a_subclass]",
    ),
    Mutation(
        "a module that is exchanged is not noticed",
        MODEL_GUARDS, "if self._trees != self._children or", "if",
        f"{INTRUDER}[a_module_of_ones_own]",
    ),
    Mutation(
        "a processor of another class is not noticed",
        MODEL_GUARDS, '[type(own.get("processor")) for own in self._attentions] != self._processors', "False",
        f"{INTRUDER}[a_processor_of_ones_own]",
    ),
    Mutation(
        "a patched method that a forward calls leaves a step closed",
        MODEL_GUARDS, "if type(function) is FunctionType and not is_own(function, _PACKAGES):", "if False:",
        f"{INTRUDER}[UNet2DConditionModel_get_time_embed]",
    ),
    Mutation(
        "functions that layers call, replaced, leave a step closed",
        UNET_GUARD, "if not are_functions_own() or self._attention_layers is None:", "if self._attention_layers is None:",
        "tests/integration/test_patched_attention.py::test_sdpa_replaced_in_the_middle_of_a_generation",
    ),
    Mutation(
        "functions that the image projection calls, replaced, leave a step closed",
        UNET_GUARD, "return self._is_pure and all(map(runs_own_functions, self._called))", "return self._is_pure",
        f"{OF_PATCHES}test_what_computes_a_remembered_value_is_replaced[after-functional.layer_norm]",
    ),
    Mutation(
        "weights are not looked at before a closed step",
        UNET_GUARD, "return self._match_layers() and self._match_weights() and", "return self._match_layers() and",
        f"{BETWEEN}[a_weight_written_to]",
    ),
    Mutation(
        "settings are not looked at before a closed step",
        UNET_GUARD, "return self._match_layers() and self._match_weights() and", "return self._match_weights() and",
        f"{BETWEEN}[heads]",
    ),
    Mutation(
        "modules of adapters are not looked at before a closed step",
        UNET_GUARD, "return len(in_place) == len(self._adapters) and all(", "return True or all(",
        f"{BETWEEN}[to_v_ip_exchanged_and_kept]",
    ),
    Mutation(
        "a bias that comes is not noticed before a closed step",
        UNET_GUARD, 'return not any(tensors["bias"] is not None for tensors in parameters)', "return True",
        f"{BETWEEN}[a_bias]",
    ),
    Mutation(
        "a projection with a bias is not looked at before a closed step",
        UNET_GUARD, " and all(part.matches() for part in self._others)", "",
        f"{OF_CLOSED}test_a_bias_written_to_between_two_closed_steps",
    ),
]  # fmt: skip

# what a layer compares in every step, closed or not
LAYERS = [
    Mutation(
        "hidden states of another shape are taken",
        PREPARED, "if type(hidden) is not Tensor or hidden.shape != self._shape:", "if type(hidden) is not Tensor:",
        f"{OF_CALL}test_a_call_is_of_one_kind_shape_dtype_and_device[unmasked]",
    ),
    Mutation(
        "hidden states of another dtype or device are taken",
        PREPARED, "if hidden.dtype is not self._dtype or hidden.device != self.device:", "if False:",
        f"{OF_CALL}test_a_call_is_of_one_kind_shape_dtype_and_device[unmasked]",
    ),
    Mutation(
        "an attention_mask is not looked at",
        FUSED, "layer is not None and attention_mask is None and not", "layer is not None and not",
        f"{OF_CALL}test_an_attention_mask_goes_to_stock[unmasked]",
    ),
    Mutation(
        "the text of a layer is not compared",
        PREPARED, "len(states) != 2 or not self._text.matches(states[0]):", "len(states) != 2:",
        f"{OF_CALL}test_what_is_edited_is_seen[unmasked-text written to]",
    ),
    Mutation(
        "the image tokens of a layer are not compared",
        PREPARED, "if not guard.matches(image):", "if False:",
        f"{OF_CALL}test_what_changes_is_seen[unmasked-one_image_written_to]",
    ),
    Mutation(
        "masks are not compared",
        PREPARED, "if mask is not None if known is None else not known.matches(mask):", "if False:",
        f"{OF_CACHE}test_masks_that_change[in place]",
    ),
    Mutation(
        "the value of a scale is not compared",
        PREPARED, "elif type(scale) is not type(before) or scale != before:", "elif type(scale) is not type(before):",
        f"{BETWEEN}[a_scale_in_place]",
    ),
    Mutation(
        "the type of a scale is not compared",
        PREPARED, "elif type(scale) is not type(before) or scale != before:", "elif scale != before:",
        f"{OF_CALL}test_scales_are_told_apart_by_type[unmasked-int]",
    ),
    Mutation(
        "a processor that was put in the place of another finds what that ran",
        FUSED, "guard is None or call.guard is not guard or", "guard is None or",
        f"{OF_CALL}test_two_processors_by_turns_in_one_attention[unmasked]",
    ),
    Mutation(
        "keys, values and masks that were written to are taken",
        PREPARED, "return [tensor._version for tensor in self.computed] == self._versions", "return True",
        f"{OF_CALL}test_what_changes_is_seen[unmasked-keys_written_to]",
    ),
    Mutation(
        "a query of another shape is taken",
        PREPARED, "if type(query) is not Tensor or query.shape != shape or", "if type(query) is not Tensor or",
        f"{OF_CALL}test_a_query_of_another_shape_is_refused_as_by_stock[eager]",
    ),
    Mutation(
        "what changes while a layer's first call computes is not noticed",
        FUSED, "keeps.guard.check() and call.matches(hidden_states, states, masks, processor.scale)", "True",
        f"{OF_CALL}test_a_scale_that_is_put_back_after_the_first_call",
    ),
]  # fmt: skip

# what it compares besides, in an open step
OPEN = [
    Mutation(
        "projections are not looked at in an open step",
        FUSED, "if not guard.check() or is_anything_replaced(", "if is_anything_replaced(",
        f"{OF_CALL}test_what_changes_is_seen[unmasked-weight_replaced]",
    ),
    Mutation(
        "functions that are replaced are not looked at in an open step",
        FUSED,
        "if not guard.check() or is_anything_replaced(ours(processor).replaces, attn, masked):", "if not guard.check():",
        f"{OF_CALL}test_what_changes_is_seen[unmasked-Linear.forward]",
    ),
    Mutation(
        "settings are not looked at in an open step",
        GUARDS, "if value is not known and (", "if False and (",
        f"{OF_CALL}test_what_changes_is_seen[unmasked-heads]",
    ),
    Mutation(
        "modes are not looked at in an open step",
        FUSED, " and call.modes == modes_of(call.device.type)", "",
        f"{OF_CALL}test_gradients_in_the_middle_reach_all_weights[unmasked]",
    ),
    Mutation(
        "a hook on to_q is not looked at in an open step",
        FUSED, 'is_same = not _is_hooked(attn._modules.get("to_q")) and', "is_same =",
        f"{OF_CALL}test_what_changes_is_seen[unmasked-a_scale_set_while_to_q_runs]",
    ),
    Mutation(
        "all steps are taken for closed ones",
        HOOKS, "step.is_closed = step.entry is not None and is_plain and", "step.is_closed = step.entry is not None and",
        f"{INTRUDER}[a_hook]",
    ),
]  # fmt: skip

# where nothing is kept, and where that is told
NOTHING = [
    Mutation(
        "steps with gradients are kept",
        CACHE, "if torch.is_grad_enabled():", "if False:",
        f"{OF_KEPT}test_the_report_says_why_values_are_not_kept[gradients]",
    ),
    Mutation(
        "steps that torch.jit traces are kept",
        CACHE, "traced = torch.jit.is_tracing()  # type: ignore[no-untyped-call]", "traced = False",
        f"{OF_KEPT}test_nothing_is_kept_of_what_is_recorded[traced]",
    ),
    Mutation(
        "steps within torch.func are kept",
        CACHE, "transformed = torch._C._functorch.peek_interpreter_stack() is not None", "transformed = False",
        f"{OF_KEPT}test_a_step_within_a_transform_of_torch_func_keeps_nothing",
    ),
    Mutation(
        "steps within make_fx are kept",
        CACHE,
        "if traced or transformed or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:",
        "if traced or transformed:",
        f"{OF_CACHE}test_a_recorded_step_holds_no_remembered_values",
    ),
    Mutation(
        "steps that are captured are kept",
        CACHE, "return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()", "return False",
        f"{OF_KEPT}test_nothing_is_kept_of_what_is_recorded[captured]",
    ),
    Mutation(
        "the report does not say what is not kept",
        CACHE, "self.reason = self.reason or reason", "pass",
        f"{OF_KEPT}test_the_report_says_why_values_are_not_kept[a quantised to_k]",
    ),
]  # fmt: skip

# where the verdict lives
VERDICT = [
    Mutation(
        "an interrupted step is found by a call without a step",
        FUSED, "if not _is_below(step.frame, call.depth):", "if False:",
        f"{OF_THREADS}test_what_an_interrupted_step_found_is_not_found_without_a_step"
        "[edit_without_a_trace-call_of_a_layer-the same thread]",
    ),
    Mutation(
        "an interrupted step is found by what computes a value without a step",
        FUSED, "if depth is None and step.frame is not None:", "if False:",
        f"{OF_THREADS}test_no_hit_is_counted_without_a_step[call_of_a_layer]",
    ),
    Mutation(
        "threads share the step that runs",
        RUNNING, "class _Thread(threading.local):", "class _Thread:",
        f"{OF_THREADS}test_a_step_is_that_of_its_thread",
    ),
    Mutation(
        "a step that raises goes on",
        RUNNING, "        THREAD.step = step.outer", "        pass",
        f"{OF_CACHE}test_a_step_that_raises_leaves_the_memory_closed",
    ),
]  # fmt: skip

# static storage, graphs and the lock
STATIC_STORAGE = [
    Mutation(
        "static storage is not refilled for another prompt",
        STATIC, "if not all(is_plain(tensor) and known.matches(tensor)", "if False and not all(is_plain(tensor)",
        f"{OF_PREPARE}test_a_graph_reads_the_buffers_and_they_follow[sd]",
    ),
    Mutation(
        "static storage is not refilled for other weights",
        STATIC, "return are_functions_own() and self._current_guards() == self._guards", "return True",
        f"{OF_EDITS}test_a_weight_that_a_callback_edits[to_k-captured]",
    ),
    Mutation(
        "static storage is read whatever is on the way to a layer",
        STATIC, 'return f"got {obstacle}: it may change what a layer is given; remove it"', "pass",
        f"{OF_PREPARE}test_a_prompt_that_someone_changes_on_the_way[hook_on_a_layer]",
    ),
    Mutation(
        "static storage is read by layers that it was not made for",
        STATIC, "if not self.are_current():", "if False:",
        f"{OF_PREPARE}test_an_attention_that_was_exchanged",
    ),
    Mutation(
        "static storage of other sizes is read",
        STATIC, "        if mismatch is not None:\n            return mismatch\n", "",
        f"{OF_PREPARE}test_a_prompt_that_does_not_fit_is_not_read_from_the_buffers",
    ),
    Mutation(
        "a step that may read static storage does not wait for another",
        HOOKS, "self.lock.acquire(frame, waits=step.may_read)", "self.lock.acquire(frame, waits=False)",
        f"{OF_INTERRUPTS}test_a_thread_that_waits_already_goes_on",
    ),
    Mutation(
        "a step that is not compiled waits for another",
        HOOKS, "self.lock.acquire(frame, waits=step.may_read)", "self.lock.acquire(frame, waits=True)",
        f"{OF_THREADS}test_a_prepared_step_that_is_not_compiled_waits_for_no_other",
    ),
    Mutation(
        "the lock of an interrupted step is held for ever",
        LOCK, "[frame for frame in self._held if is_running(frame, self._owner)]", "list(self._held)",
        f"{OF_INTERRUPTS}test_another_thread_clears_after_an_interrupt",
    ),
    Mutation(
        "eager steps write tables of scales",
        HOOKS, "if self.graphs is not None or not is_plain or steps.is_capturing(self.context):", "if True:",
        "tests/integration/test_promises.py::test_eager_steps_pay_nothing_for_graphs",
    ),
]  # fmt: skip

# what AnimateDiff and Kolors compute before their layers
PROJECTIONS = [
    Mutation(
        "AnimateDiff's repeated tokens are not kept",
        IMAGES, 'return _kept(tokens, ("repeat", repeats, dim, output_size), None, repeat)', "return repeat()",
        "tests/integration/test_projection_counts.py::test_each_projection_is_computed_once_for_each_input[AnimateDiff]",
    ),
    Mutation(
        "Kolors' text is projected in every step",
        IMAGES, 'return _kept(input, "text", self, lambda: forward(input), "text_encoder_hid_proj")', "return forward(input)",
        "tests/integration/test_projection_counts.py::test_each_projection_is_computed_once_for_each_input[Kolors]",
    ),
]  # fmt: skip

MUTATIONS = [*VALUES, *CONDITIONS, *CLOSED, *LAYERS, *OPEN, *NOTHING, *VERDICT, *STATIC_STORAGE, *PROJECTIONS]
