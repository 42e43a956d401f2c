use std::fs;
use std::io::Write;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use zip::write::FileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::archive::Archive;
use crate::bundle::Bundle;
use crate::data::{DataOptions, Dataset, Encoder};
use crate::prompt::Array;

/// Name, NumPy element type, shape and bytes.
type Tensor<'a> = (&'a str, &'a str, Vec<usize>, Vec<u8>);

fn ints<'a>(name: &'a str, shape: &[usize], data: &[i64]) -> Tensor<'a> {
    (name, "<i8", shape.to_vec(), data.iter().flat_map(|x| x.to_le_bytes()).collect())
}

fn zeros<'a>(name: &'a str, shape: &[usize]) -> Tensor<'a> {
    (name, "<f4", shape.to_vec(), vec![0; shape.iter().product::<usize>() * 4])
}

fn npz(path: &Path, tensors: &[Tensor], method: CompressionMethod) {
    let mut zip = ZipWriter::new(fs::File::create(path).unwrap());
    for (name, descr, shape, bytes) in tensors {
        zip.start_file(format!("{name}.npy"), FileOptions::default().compression_method(method)).unwrap();
        let sizes: String = shape.iter().map(|size| format!("{size}, ")).collect();
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({sizes}), }}\n");
        zip.write_all(b"\x93NUMPY\x01\x00").unwrap();
        zip.write_all(&(header.len() as u16).to_le_bytes()).unwrap();
        zip.write_all(header.as_bytes()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

fn safetensors(path: &Path, tensors: &[Tensor]) {
    let dtype = |descr: &str| match descr {
        "<f4" => Dtype::F32,
        "<f8" => Dtype::F64,
        "<i8" => Dtype::I64,
        other => panic!("{other}"),
    };
    let views = tensors.iter().map(|(name, descr, shape, bytes)| {
        (name.to_string(), TensorView::new(dtype(descr), shape.clone(), bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, &None).unwrap()).unwrap();
}

fn model() -> Bundle {
    Bundle::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")).unwrap()
}

/// Error message for a file with these tensors and a decoder with `inputs_embeds` of width 160.
fn refused(tensors: &[Tensor]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("batch.safetensors");
    safetensors(&path, tensors);
    Dataset::open_for(&path, &model(), &DataOptions::default()).unwrap_err().to_string()
}

#[test]
fn npz_and_safetensors_files_give_the_same_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = [
        ints("a", &[2, 2], &[1, -2, 3, 1 << 40]),
        ("b", "<f4", vec![3], [1f32, -0.5, 2.0].map(f32::to_le_bytes).concat()),
    ];
    let (plain, packed, safe) =
        (folder.path().join("p.npz"), folder.path().join("c.npz"), folder.path().join("s.safetensors"));
    npz(&plain, &tensors, CompressionMethod::Stored);
    npz(&packed, &tensors, CompressionMethod::Deflated);
    safetensors(&safe, &tensors);
    for path in [&plain, &packed, &safe] {
        let archive = Archive::open(path).unwrap();
        let a = archive.read("a").unwrap();
        assert_eq!((a.shape(), a.to_ints().unwrap()), (&[2, 2][..], vec![1, -2, 3, 1 << 40]), "{path:?}");
        assert_eq!(archive.read("b").unwrap().to_floats(), [1.0, -0.5, 2.0], "{path:?}");
    }
}

#[test]
fn small_element_types_are_widened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npz");
    let half = [0x00u8, 0x3c, 0x00, 0xc0].to_vec();
    let tensors = [
        ("h", "<f2", vec![2], half),
        ("i", "<i4", vec![2], [7i32, -7].map(i32::to_le_bytes).concat()),
        ("u", "|u1", vec![2], vec![0, 255]),
        ("b", "|b1", vec![2], vec![1, 0]),
    ];
    npz(&path, &tensors, CompressionMethod::Stored);
    let archive = Archive::open(&path).unwrap();
    assert_eq!(archive.read("h").unwrap().to_floats(), [1.0, -2.0]);
    assert_eq!(archive.read("i").unwrap().to_ints().unwrap(), [7, -7]);
    assert_eq!(archive.read("u").unwrap().to_ints().unwrap(), [0, 255]);
    assert!(matches!(archive.read("b").unwrap(), Array::Bool(_)));
}

#[test]
fn damaged_files_are_refused_without_large_allocations() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = [ints("a", &[4], &[1, 2, 3, 4])];
    let path = folder.path().join("x.npz");
    for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
        npz(&path, &tensors, method);
        let whole = fs::read(&path).unwrap();
        for length in (0..whole.len()).step_by(7) {
            fs::write(&path, &whole[..length]).unwrap();
            let error = Archive::open(&path).and_then(|archive| archive.read("a")).unwrap_err().to_string();
            assert!(error.contains("x.npz"), "{length} bytes: {error}");
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x5a;
            fs::write(&path, &bytes).unwrap();
            // A damaged file gives an error or other numbers, but no panic.
            drop(Archive::open(&path).and_then(|archive| archive.read("a")));
        }
    }
    // A shape that needs more bytes than the file has.
    npz(&path, &[("a", "<f4", vec![1 << 40, 1 << 20], vec![0; 16])], CompressionMethod::Deflated);
    let error = Archive::open(&path).unwrap_err().to_string();
    assert!(error.contains("array `a.npy` has") && error.contains("np.savez"), "{error}");
    let path = folder.path().join("x.safetensors");
    safetensors(&path, &tensors);
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let error = Archive::open(&path).err().unwrap().to_string();
        assert!(error.contains("x.safetensors"), "{length} bytes: {error}");
    }
}

#[test]
fn tensors_that_do_not_fit_the_graphs_are_named() {
    let ids = || ints("input_ids", &[2, 3], &[1, 2, 3, 4, 5, 6]);
    let embeds = || zeros("inputs_embeds", &[2, 3, 160]);
    let cases: Vec<(Vec<Tensor>, &[&str])> = vec![
        (
            vec![ints("tokens", &[1, 3], &[1, 2, 3])],
            &["neither `input_ids` nor `inputs_embeds`", "only `tokens`", "inspect"],
        ),
        (
            vec![embeds(), zeros("hidden", &[1, 3])],
            &["tensor `hidden`", "float32 [1, 3]", "no graph of the model", "position_ids"],
        ),
        (vec![zeros("inputs_embeds", &[2, 3, 161])], &["[2, 3, 161]", "[batch_size, sequence_length, 160]"]),
        (
            vec![("inputs_embeds", "<f8", vec![1, 1, 160], vec![0; 1280])],
            &["float64 [1, 1, 160]", "astype(np.float32)"],
        ),
        (vec![zeros("input_ids", &[2, 3])], &["float32 [2, 3]", "int64"]),
        (vec![ids(), ints("attention_mask", &[2, 4], &[1; 8])], &["attention_mask", "[2, 4]", "2 rows of 3 tokens"]),
        (vec![ids(), ints("labels", &[3, 2], &[-100; 6])], &["labels", "[3, 2]", "2 rows of 3 tokens"]),
        (vec![ids(), ints("labels", &[6], &[-100; 6])], &["labels", "[6]", "2 axes"]),
        (
            vec![ids(), ints("labels", &[2, 3], &[1, 2, 3, 4, 5, 7])],
            &["row 1 of", "label 7 at position 2", "its token is 6"],
        ),
        (vec![ids(), ints("labels", &[2, 3], &[-1, 2, 3, 4, 5, 6])], &["label -1 at position 0", "-100"]),
        (vec![ids(), ints("attention_mask", &[2, 3], &[1, 0, 1, 1, 1, 1])], &["row 0 of", "not one run of ones"]),
        (
            vec![
                ids(),
                ints("attention_mask", &[2, 3], &[0, 1, 1, 1, 1, 1]),
                ints("labels", &[2, 3], &[1, 2, 3, 4, 5, 6]),
            ],
            &["label 1 at position 0, which is padding"],
        ),
        (
            vec![embeds(), zeros("pixel_values", &[1, 1, 3, 64, 64])],
            &["pixel_values", "beside `inputs_embeds`", "leave it out"],
        ),
        (vec![ids(), zeros("pixel_values", &[1, 1, 3, 32, 64])], &["[1, 1, 3, 32, 64]", "num_images, 3, 64, 64"]),
        (vec![ints("input_ids", &[0, 3], &[])], &["[0, 3]", "holds no token"]),
    ];
    for (tensors, wanted) in cases {
        let message = refused(&tensors);
        for part in wanted {
            assert!(message.contains(part), "expected `{part}` in: {message}");
        }
    }
}

#[test]
fn padding_is_removed_and_prompts_end_before_the_last_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("batch.safetensors");
    let tensors = [
        ints("input_ids", &[2, 5], &[0, 0, 7, 8, 9, 1, 2, 3, 4, 5]),
        ints("attention_mask", &[2, 5], &[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]),
        ints("labels", &[2, 5], &[-100, -100, -100, 8, 9, -100, 2, -100, 4, 5]),
    ];
    safetensors(&path, &tensors);
    let model = model();
    let dataset = Dataset::open_for(&path, &model, &DataOptions::default()).unwrap();
    let encoder = Encoder::open(&model, &dataset).unwrap();
    let samples: Vec<_> = dataset.read(&[0, 1]).unwrap().map(Result::unwrap).collect();
    assert_eq!(samples[1].id, "row 1 of `batch.safetensors`");
    let whole: Vec<_> = samples.iter().map(|sample| encoder.conversation(sample).unwrap()).collect();
    assert_eq!(whole[0].input_ids, [7, 8, 9]);
    assert_eq!(whole[0].answer_mask, [false, true, true]);
    assert_eq!(whole[1].answer_mask, [false, true, false, true, true]);
    let prompts: Vec<_> = samples.iter().map(|sample| encoder.prompt(sample).unwrap()).collect();
    assert_eq!(prompts[0].input_ids, [7]);
    assert_eq!(prompts[1].input_ids, [1, 2, 3]);
    assert_eq!(prompts[0].given.as_ref().unwrap().tokens, 2..3);
}

#[test]
fn a_folder_of_tensor_files_is_one_data_set_in_any_order() {
    let model = model();
    let drawn = |names: [&str; 2]| {
        let folder = tempfile::tempdir().unwrap();
        for (name, first) in names.iter().zip([1, 2]) {
            safetensors(&folder.path().join(name), &[ints("input_ids", &[1, 2], &[first, 3])]);
        }
        let dataset = Dataset::open_for(folder.path(), &model, &DataOptions::default()).unwrap();
        let encoder = Encoder::open(&model, &dataset).unwrap();
        let subset = crate::data::Subset { amount: crate::data::Amount::Samples(1), seed: 3 };
        let drawn = dataset.draw(subset).unwrap();
        let sample = dataset.read(&drawn).unwrap().next().unwrap().unwrap();
        encoder.prompt(&sample).unwrap().input_ids
    };
    assert_eq!(drawn(["a.safetensors", "b.safetensors"]), drawn(["b.safetensors", "a.safetensors"]));
    let folder = tempfile::tempdir().unwrap();
    safetensors(&folder.path().join("a.safetensors"), &[ints("input_ids", &[1, 2], &[1, 3])]);
    fs::write(folder.path().join("b.json"), "[]").unwrap();
    let error = Dataset::open_for(folder.path(), &model, &DataOptions::default()).unwrap_err().to_string();
    assert!(error.contains("of .json or .jsonl and of .safetensors or .npz"), "{error}");
}
