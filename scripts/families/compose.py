"""Runs the exported parts together in ONNX Runtime, as an application would, to check an export before its use."""
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
        parts = ("vision_encoder", "projector", "embed_tokens", "decoder", "head")
        self.vision, self.projector, self.embed, self.decoder, self.head = (
            open_(files[key]) if key in files else None for key in parts
        )
        self.family = family
        self.image_token = family.image_token_id

    def logits(self, inputs, positions):
        """Logits of a prompt from a processor's outputs and its position ids `[rows, 1, T]`."""
        ids = inputs["input_ids"].numpy()
        place = ids == self.image_token
        given = self.embedded(ids, place, inputs)
        given |= {"attention_mask": np.ones_like(ids), "input_ids": ids}
        given["position_ids"] = positions if self.family.position_rows > 1 else positions[0]
        feeds = {}
        for port in self.decoder.get_inputs():
            if port.name in given:
                feeds[port.name] = given[port.name]
            elif port.name == "pixel_values":
                feeds[port.name] = self.pixels(inputs, port)
            else:
                kind = {"tensor(float)": np.float32, "tensor(int64)": np.int64}[port.type]
                sizes = [1 if axis == 0 else 0 if isinstance(size, str) else size for axis, size in enumerate(port.shape)]
                if not port.name.startswith("past_"):
                    raise ValueError(f"decoder input {port.name} {port.shape} is not known")
                feeds[port.name] = np.zeros(sizes, kind)
        found = self.decoder.run(None, feeds)[0]
        return found if self.head is None else self.head.run(None, {"hidden_states": found})[0]

    def pixels(self, inputs, port):
        """A prompt's pictures as a graph takes them that reads ids too; none for a text."""
        sizes = [0 if isinstance(size, str) else size for size in port.shape]
        pixels = inputs["pixel_values"].numpy() if "pixel_values" in inputs else np.zeros(sizes, np.float32)
        return pixels.reshape(1, -1, *sizes[-3:]) if len(sizes) == 5 else pixels

    def embedded(self, ids, place, inputs):
        """What the decoder reads in the place of ids."""
        if self.embed is None:
            return {}
        given = {"input_ids": ids}
        names = [port.name for port in self.embed.get_inputs()]
        if "pixel_values" in names:
            port = self.embed.get_inputs()[names.index("pixel_values")]
            given["pixel_values"] = self.pixels(inputs, port)
            count = given["pixel_values"].shape[1]
            given["images_seq_mask"] = place
            each = self.embed.get_inputs()[names.index("images_emb_mask")].shape[2]
            given["images_emb_mask"] = np.ones((1, count, each), bool)
            return {"inputs_embeds": self.embed.run(None, given)[0]}
        features = self.features(inputs)
        if "image_features" in names:
            width = self.embed.get_inputs()[1].shape[-1]
            given["image_features"] = features[0] if features else np.zeros((0, width), np.float32)
        made = dict(zip([port.name for port in self.embed.get_outputs()], self.embed.run(None, given)))
        if features and "image_features" not in given:
            made["inputs_embeds"][place] = features[0].reshape(-1, features[0].shape[-1])
        return made | self.extras(inputs, made, place, features[1:])

    def features(self, inputs):
        if "pixel_values" not in inputs:
            return []
        if self.family.one_by_one:
            if "image_sizes" in [port.name for port in self.vision.get_inputs()]:
                rows = zip(inputs["pixel_values"][:, None], inputs["image_sizes"][:, None])
                return [np.concatenate([self.encoded({"pixel_values": p, "image_sizes": s})[0] for p, s in rows])]
            rows = zip(inputs["pixel_values"], inputs["image_sizes"].tolist())
            return [np.concatenate([self.encoded({"pixel_values": p[None, :, :h, :w]})[0] for p, (h, w) in rows])]
        return self.encoded(inputs)

    def encoded(self, inputs):
        given = {}
        for port in self.vision.get_inputs():
            value = inputs[ALIASES.get(port.name, port.name)]
            value = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            given[port.name] = value.astype({"tensor(bool)": bool, "tensor(int64)": np.int64}.get(port.type, np.float32))
        found = self.vision.run(None, given)
        return found if self.projector is None else self.projector.run(None, {"image_features": found[0]})

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
