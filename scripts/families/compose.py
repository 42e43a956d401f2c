"""The exported parts put together in ONNX Runtime as a caller would, to check an export before it is used."""
import numpy as np
import onnxruntime as ort
import torch

import export

ort.set_default_logger_severity(3)
ALIASES = {"grid_thw": "image_grid_thw", "pixel_position_ids": "image_position_ids"}


class Parts:
    def __init__(self, folder, family):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        open_ = lambda file: ort.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        files = export.FILES[family.layout]
        self.vision, self.embed, self.decoder = (open_(files[key]) for key in ("vision_encoder", "embed_tokens", "decoder"))
        self.family = family
        self.image_token = family.image_token_id

    def logits(self, inputs, positions):
        """Logits of a prompt from a processor's outputs and its position ids `[rows, 1, T]`."""
        ids = inputs["input_ids"].numpy()
        features = self.features(inputs)
        given = {"input_ids": ids}
        if len(self.embed.get_inputs()) > 1:
            width = self.embed.get_inputs()[1].shape[-1]
            given["image_features"] = features[0] if features else np.zeros((0, width), np.float32)
        made = dict(zip([port.name for port in self.embed.get_outputs()], self.embed.run(None, given)))
        merged = "image_features" in given
        given = made | {"attention_mask": np.ones_like(ids)}
        given["position_ids"] = positions if self.family.position_rows > 1 else positions[0]
        place = ids == self.image_token
        if features and not merged:
            given["inputs_embeds"][place] = features[0].reshape(-1, features[0].shape[-1])
        given |= self.extras(inputs, given, place, features[1:])
        feeds = {}
        for port in self.decoder.get_inputs():
            if port.name in given:
                feeds[port.name] = given[port.name]
            else:
                kind = {"tensor(float)": np.float32, "tensor(int64)": np.int64}[port.type]
                sizes = [1 if axis == 0 else 0 if isinstance(size, str) else size for axis, size in enumerate(port.shape)]
                if not port.name.startswith("past_"):
                    raise ValueError(f"decoder input {port.name} {port.shape} is not known")
                feeds[port.name] = np.zeros(sizes, kind)
        return self.decoder.run(["logits"], feeds)[0]

    def features(self, inputs):
        if "pixel_values" not in inputs:
            return []
        if self.family.one_by_one:
            rows = zip(inputs["pixel_values"], inputs["image_sizes"].tolist())
            return [np.concatenate([self.encoded({"pixel_values": p[None, :, :h, :w]})[0] for p, (h, w) in rows])]
        return self.encoded(inputs)

    def encoded(self, inputs):
        given = {}
        for port in self.vision.get_inputs():
            value = inputs[ALIASES.get(port.name, port.name)]
            value = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            given[port.name] = value.astype({"tensor(bool)": bool, "tensor(int64)": np.int64}.get(port.type, np.float32))
        return self.vision.run(None, given)

    def extras(self, inputs, given, place, features):
        """Inputs that only some decoders have."""
        names = [port.name for port in self.decoder.get_inputs()]
        width = given["inputs_embeds"].shape[-1]
        out = {}
        if "token_type_ids" in names:
            out["token_type_ids"] = inputs["token_type_ids"].numpy()
        if "visual_pos_masks" in names:
            out["visual_pos_masks"] = place
        count = 3 if self.family.counts_layers else 0
        if not count:
            return out
        dense = [np.zeros_like(given["inputs_embeds"]) for _ in range(count)]
        for target, source in zip(dense, features):
            target[place] = source
        if "visual_pos_masks" in names:
            dense = features or [np.zeros((0, width), np.float32)] * count
        if "deepstack_features_0" in names:
            return out | {f"deepstack_features_{number}": value for number, value in enumerate(dense)}
        return {"inputs_embeds": np.concatenate([given["inputs_embeds"], *dense], -1)}
