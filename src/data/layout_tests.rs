//! Data sets in every layout: rows that are read, left out or refused.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use ::parquet::file::properties::WriterProperties;
use arrow::array::{ArrayRef, BinaryArray, Int64Array, ListArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::Field;

use super::tests::{png, write};
use super::*;
use crate::base::{Error, Result};

fn separate() -> DataOptions {
    DataOptions { turns: Turns::Separate, ..DataOptions::default() }
}

fn whole() -> DataOptions {
    DataOptions::default()
}

fn all(data: &Dataset) -> Vec<Result<Sample>> {
    data.read(&(0..data.len()).collect::<Vec<_>>()).unwrap().collect()
}

fn opened(path: &Path) -> Vec<Sample> {
    all(&Dataset::open(path, &whole()).unwrap()).into_iter().map(Result::unwrap).collect()
}

fn shade(image: &ImageBytes) -> u8 {
    Picture::decode(image, Transparency::OnWhite).unwrap().rgb()[0]
}

fn list(values: ArrayRef, lengths: &[usize]) -> ArrayRef {
    let field = Arc::new(Field::new("item", values.data_type().clone(), true));
    Arc::new(ListArray::new(field, OffsetBuffer::from_lengths(lengths.iter().copied()), values, None))
}

fn fields(columns: Vec<(&str, ArrayRef)>) -> ArrayRef {
    let columns = columns
        .into_iter()
        .map(|(name, array)| (Arc::new(Field::new(name, array.data_type().clone(), true)), array))
        .collect::<Vec<_>>();
    Arc::new(StructArray::from(columns))
}

fn strings<S: AsRef<str>>(texts: &[S]) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(texts))
}

/// Pictures of these shades in the Hugging Face Hub's layout: `struct{bytes, path}`.
fn pictures(shades: &[u8]) -> ArrayRef {
    let bytes: ArrayRef = Arc::new(BinaryArray::from_iter_values(shades.iter().map(|shade| png(*shade))));
    let names: ArrayRef = Arc::new(StringArray::from(vec![None::<&str>; shades.len()]));
    fields(vec![("bytes", bytes), ("path", names)])
}

/// Writes a Parquet file of `rows` rows with two turns each, five rows per row group. The shade of a row's picture is
/// the row number.
pub(super) fn shard(path: &Path, rows: usize, nested: bool) {
    let shades: Vec<u8> = (0..rows).map(|row| row as u8).collect();
    let plain: ArrayRef = Arc::new(BinaryArray::from_iter_values(shades.iter().map(|shade| png(*shade))));
    let images = if nested { pictures(&shades) } else { plain };
    let say = |what: &str| strings(&(0..rows * 2).map(|t| format!("{what} {} {}", t / 2, t % 2)).collect::<Vec<_>>());
    let texts = fields(vec![("user", say("q")), ("assistant", say("a"))]);
    let columns = vec![
        ("images", list(images, &vec![1; rows])),
        ("texts", list(texts, &vec![2; rows])),
        ("source", strings(&vec!["made"; rows])),
    ];
    write_parquet(path, columns);
}

fn write_parquet(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let properties = WriterProperties::builder().set_max_row_group_size(5).build();
    let mut writer = ArrowWriter::try_new(fs::File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

const ONE: &str = r#"{"id": "x", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "cat"}, {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]}"#;
const NONE: &str = r#"{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "ho"}]}"#;

#[test]
fn llava_files_are_read_as_json_lists_and_json_lines() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.png"), png(3)).unwrap();
    let list = write(folder.path(), "list.json", &format!("[{ONE},\n {NONE}]"));
    let lines = write(folder.path(), "lines.jsonl", &format!("{ONE}\n\n{NONE}\n"));
    for path in [list, lines] {
        let samples = opened(&path);
        assert_eq!((samples[0].index, samples[0].turns.len(), samples[1].images.len()), (0, 2, 0));
        assert_eq!(samples[0].turns[0].user, [MessagePart::Image(0), MessagePart::Text("What?".into())]);
        assert_eq!(shade(&samples[0].images[0]), 3);
        assert!(samples[0].id.starts_with("row 0 of `li") && samples[0].id.ends_with("(id `x`)"), "{}", samples[0].id);
        assert_eq!(Dataset::open(&path, &separate()).unwrap().len(), 3);
    }
}

#[test]
fn llava_conversations_may_have_a_system_turn_and_pictures_in_any_turn() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (png(1), png(2));
    fs::write(folder.path().join("a.png"), first).unwrap();
    fs::write(folder.path().join("b.png"), second).unwrap();
    let text = r#"[{"image": ["a.png", "b.png"], "conversations": [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "ho"},
        {"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "cat"},
        {"from": "human", "value": "And\n<image>"}, {"from": "gpt", "value": "dog"}]}]"#;
    let path = write(folder.path(), "x.json", text);
    let sample = opened(&path).remove(0);
    assert_eq!((sample.system.as_deref(), sample.turns.len()), (Some("Be short."), 3));
    assert_eq!(sample.turns[2].user, [MessagePart::Text("And".into()), MessagePart::Image(1)]);
    let turns: Vec<Sample> = all(&Dataset::open(&path, &separate()).unwrap()).into_iter().map(Result::unwrap).collect();
    assert_eq!(turns.iter().map(|turn| turn.images.len()).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(turns[2].turns[0].user, [MessagePart::Image(0), MessagePart::Text("And".into()), MessagePart::Image(1)]);
    assert!(turns.iter().all(|turn| turn.system.is_some()));
}

/// Reading a sample does not read the rows before it: the test overwrites them.
#[test]
fn a_sample_is_read_without_reading_the_samples_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let rows: Vec<String> = (0..500).map(|row| NONE.replace("ho", &format!("answer {row}"))).collect();
    let list = write(folder.path(), "list.json", &format!("[{}]", rows.join(",\n")));
    let lines = write(folder.path(), "lines.jsonl", &rows.join("\n"));
    for path in [list, lines] {
        let data = Dataset::open(&path, &whole()).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - rows[499].len() - 1;
        bytes[..last].fill(b'x');
        fs::write(&path, bytes).unwrap();
        let sample = data.read(&[499]).unwrap().next().unwrap().unwrap();
        assert_eq!(sample.turns[0].assistant, "answer 499");
        let error = data.read(&[0]).unwrap().next().unwrap().unwrap_err().to_string();
        assert!(error.starts_with("row 0 of `"), "{error}");
    }
    let path = folder.path().join("x.parquet");
    shard(&path, 50, true);
    let data = Dataset::open(&path, &whole()).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    // The file has ten row groups. The pages of the first nine are overwritten.
    let groups = ::parquet::arrow::arrow_reader::ArrowReaderMetadata::load(
        &fs::File::open(&path).unwrap(),
        ::parquet::arrow::arrow_reader::ArrowReaderOptions::new(),
    );
    let begin = groups.unwrap().metadata().row_group(9).column(0).byte_range().0 as usize;
    bytes[..begin].fill(0);
    fs::write(&path, bytes).unwrap();
    let sample = data.read(&[49]).unwrap().next().unwrap().unwrap();
    assert_eq!((sample.turns[1].assistant.as_str(), shade(&sample.images[0])), ("a 49 1", 49));
    let error = data.read(&[0]).unwrap().next().unwrap().unwrap_err().to_string();
    assert!(error.contains("x.parquet"), "{error}");
}

#[test]
fn unread_keys_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (extra, want) in
        [(r#""video": "a.mp4", "#, "`video`"), (r#""depth": "d.png", "audio": 3, "#, "`audio`, `depth`")]
    {
        let text = format!("{NONE}\n{}\n", NONE.replacen('{', &format!("{{{extra}"), 1));
        let path = write(folder.path(), "x.jsonl", &text);
        let error = Dataset::open(&path, &whole()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(want) && error.to_string().contains("row 1 of"), "{error}");
    }
    let path = write(folder.path(), "x.jsonl", &NONE.replacen('{', r#"{"video": "a.mp4", "#, 1));
    let ignoring = DataOptions { ignore_keys: vec!["video".into()], ..whole() };
    assert_eq!(Dataset::open(&path, &ignoring).unwrap().len(), 1);
    fs::write(folder.path().join("a.png"), png(3)).unwrap();
    let text = NONE.replacen('{', r#"{"images": ["a.png"], "#, 1);
    assert_eq!(opened(&write(folder.path(), "x.jsonl", &text))[0].images.len(), 1);

    let texts = fields(vec![("user", strings(&["q"])), ("assistant", strings(&["a"]))]);
    let columns = |extra: ArrayRef| vec![("texts", list(texts.clone(), &[1])), ("video", extra)];
    let path = folder.path().join("x.parquet");
    write_parquet(&path, columns(strings(&["a.mp4"])));
    let error = Dataset::open(&path, &whole()).unwrap_err().to_string();
    assert!(error.contains("without a reader: `video`"), "{error}");
    write_parquet(&path, columns(Arc::new(StringArray::from(vec![None::<&str>]))));
    assert_eq!(opened(&path).len(), 1);
}

#[test]
fn malformed_json_is_refused_as_a_file_or_as_a_row() {
    let folder = tempfile::tempdir().unwrap();
    for (text, want) in [("[]", "is empty"), ("[{", "ends before its list")] {
        let error = Dataset::open(&write(folder.path(), "bad.json", text), &whole()).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    let out = ONE.replace("a.png", "../a.png");
    for (row, want) in [
        (r#"{"conversations": []}"#, "has no `conversations`"),
        (r#"{"conversations": [{"from": "gpt", "value": "x"}]}"#, "turn 0 is by the assistant then nobody"),
        ("{\"conversations\"", "does not decode"),
        (out.as_str(), "without `..`"),
    ] {
        let path = write(folder.path(), "bad.jsonl", &format!("{NONE}\n{row}\n{NONE}\n"));
        let rows = all(&Dataset::open(&path, &whole()).unwrap());
        assert!(rows[0].is_ok() && rows[2].is_ok());
        let error = rows[1].as_ref().unwrap_err().to_string();
        assert!(error.contains("row 1 of `bad.jsonl`") && error.contains(want), "{error}");
    }
}

#[test]
fn shards_of_a_folder_or_a_pattern_form_one_data_set() {
    let folder = tempfile::tempdir().unwrap();
    shard(&folder.path().join("train-0.parquet"), 12, true);
    shard(&folder.path().join("train-1.parquet"), 3, false);
    let turns = Dataset::open(folder.path(), &separate()).unwrap();
    assert_eq!(turns.len(), 30);
    let wanted = [29, 0, 3, 13, 25, 12];
    let samples: Vec<Sample> = turns.read(&wanted).unwrap().map(Result::unwrap).collect();
    let found: Vec<usize> = samples.iter().map(|sample| sample.index).collect();
    assert_eq!(found, [0, 3, 12, 13, 25, 29]);
    let row = |index: usize| if index < 24 { index / 2 } else { (index - 24) / 2 };
    for sample in &samples {
        let (row, text) = (row(sample.index), sample.index % 2);
        let want = Turn {
            user: vec![MessagePart::Image(0), MessagePart::Text(format!("q {row} {text}"))],
            assistant: format!("a {row} {text}"),
        };
        assert_eq!(sample.turns, [want]);
        assert_eq!(usize::from(shade(&sample.images[0])), row);
    }
    let pattern = folder.path().join("train-?.parquet");
    for path in [folder.path(), &pattern] {
        let samples = opened(path);
        assert_eq!(samples.len(), 15);
        assert!(samples.iter().all(|sample| sample.turns.len() == 2));
        assert_eq!(
            (samples[14].turns[1].assistant.as_str(), samples[14].id.as_str()),
            ("a 2 1", "row 2 of `train-1.parquet`")
        );
    }
    let error = turns.read(&[30]).err().unwrap().to_string();
    assert_eq!(error, "data: sample 30 does not exist, there are 30");
}

#[test]
fn draws_do_not_depend_on_shard_names_and_shard_order() {
    let drawn = |names: [&str; 2], options: &DataOptions| -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        shard(&folder.path().join(names[0]), 12, true);
        let talk = |n: usize| NONE.replace("Hi", &format!("Hi {n}"));
        let lines: Vec<String> = (0..9).map(talk).collect();
        write(folder.path(), "x.jsonl", &lines.join("\n"));
        let texts = fields(vec![("user", strings(&["u", "v", "w"])), ("assistant", strings(&["a", "b", "c"]))]);
        write_parquet(&folder.path().join(names[1]), vec![("texts", list(texts, &[1, 1, 1]))]);
        let data = Dataset::open(&folder.path().join("*.parquet"), options).unwrap();
        let indices = data.draw(Subset { amount: Amount::Samples(9), seed: 42 }).unwrap();
        let mut texts = vec![String::new(); data.len()];
        for sample in data.read(&indices).unwrap().map(Result::unwrap) {
            texts[sample.index] = sample.turns[0].assistant.clone();
        }
        indices.iter().map(|&index| texts[index].clone()).collect()
    };
    for options in [whole(), separate()] {
        let here = drawn(["a.parquet", "b.parquet"], &options);
        assert_eq!(here, drawn(["z.parquet", "b.parquet"], &options));
        assert_eq!(here.iter().collect::<std::collections::BTreeSet<_>>().len(), 9);
    }
}

#[test]
fn onevision_and_cauldron_columns_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let said = fields(vec![
        ("from", strings(&["human", "gpt", "human", "gpt"])),
        ("value", strings(&["<image>\nq", "a", "q2", "a2"])),
    ]);
    let columns = vec![
        ("id", strings(&["one", "two"])),
        ("image", pictures(&[5, 6])),
        ("conversations", list(said, &[4, 0])),
        ("data_source", strings(&["s", "s"])),
    ];
    write_parquet(&path, columns);
    let rows = all(&Dataset::open(&path, &whole()).unwrap());
    let first = rows[0].as_ref().unwrap();
    assert_eq!(
        (first.turns.len(), shade(&first.images[0]), first.id.as_str()),
        (2, 5, "row 0 of `x.parquet` (id `one`)")
    );
    assert!(rows[1].as_ref().unwrap_err().to_string().contains("has no question and answer"));

    let nothing: ArrayRef = Arc::new(BinaryArray::from_opt_vec(vec![None]));
    let no_path: ArrayRef = Arc::new(StringArray::from(vec![None::<&str>]));
    let said = fields(vec![("from", strings(&["human", "gpt"])), ("value", strings(&["q", "a"]))]);
    let blank = fields(vec![("bytes", nothing), ("path", no_path)]);
    write_parquet(&path, vec![("image", blank), ("conversations", list(said, &[2]))]);
    assert!(opened(&path)[0].images.is_empty());

    let texts = fields(vec![("user", strings(&["q"])), ("assistant", strings(&["a"])), ("source", strings(&["vqa"]))]);
    write_parquet(&path, vec![("images", list(pictures(&[7, 8]), &[2])), ("texts", list(texts, &[1]))]);
    assert_eq!(opened(&path)[0].images.iter().map(shade).collect::<Vec<_>>(), [7, 8]);
}

#[test]
fn messages_columns_hold_strings_or_parts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let roles = || strings(&["system", "user", "assistant"]);
    let plain = fields(vec![("role", roles()), ("content", strings(&["s", "q", "a"]))]);
    write_parquet(&path, vec![("messages", list(plain, &[3]))]);
    let sample = opened(&path).remove(0);
    assert_eq!((sample.system.as_deref(), sample.turns[0].assistant.as_str()), (Some("s"), "a"));

    let parts = fields(vec![
        ("type", strings(&["text", "image", "text", "image", "text"])),
        ("text", Arc::new(StringArray::from(vec![Some("s"), None, Some("or"), None, Some("a")]))),
        ("index", Arc::new(Int64Array::from(vec![None, Some(1), None, Some(0), None]))),
    ]);
    let content = list(parts, &[1, 3, 1]);
    let said = fields(vec![("role", roles()), ("content", content)]);
    write_parquet(&path, vec![("images", list(pictures(&[1, 2]), &[2])), ("messages", list(said, &[3]))]);
    let sample = opened(&path).remove(0);
    assert_eq!(sample.turns[0].user, [MessagePart::Image(0), MessagePart::Text("or".into()), MessagePart::Image(1)]);
    assert_eq!(sample.images.iter().map(shade).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn minimum_ratings_select_rows() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let texts = fields(vec![("user", strings(&["q", "q", "q"])), ("assistant", strings(&["a", "b", "c"]))]);
    let ratings: ArrayRef = Arc::new(Int64Array::from(vec![5, 2, 4]));
    write_parquet(
        &path,
        vec![
            ("texts", list(texts, &[1, 1, 1])),
            ("relevance_ratings", list(ratings, &[1, 1, 1])),
            ("relevance_min", Arc::new(Int64Array::from(vec![Some(5), Some(2), None]))),
        ],
    );
    let kept = |column: &str, least: f64| -> Vec<String> {
        let options = DataOptions { min_ratings: [(column.to_string(), least)].into(), ..whole() };
        let data = Dataset::open(&path, &options).unwrap();
        all(&data).into_iter().map(|sample| sample.unwrap().turns[0].assistant.clone()).collect()
    };
    assert_eq!(kept("relevance_min", 2.0), ["a", "b"]);
    assert_eq!(kept("relevance_ratings", 3.0), ["a", "c"]);
    for (column, least, want) in
        [("relevance", 1.0, "has no column `relevance`"), ("relevance_min", 9.0, "no row that reaches")]
    {
        let options = DataOptions { min_ratings: [(column.to_string(), least)].into(), ..whole() };
        let error = Dataset::open(&path, &options).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    let plain = Dataset::open(&path, &whole()).unwrap().digest().unwrap();
    let options = DataOptions { min_ratings: [("relevance_min".to_string(), 2.0)].into(), ..whole() };
    assert_ne!(plain, Dataset::open(&path, &options).unwrap().digest().unwrap());
}

#[test]
fn malformed_parquet_rows_and_files_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let bytes: ArrayRef = Arc::new(BinaryArray::from_opt_vec(vec![Some(&b"x"[..]), None]));
    let answers: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None]));
    let whole_answers = fields(vec![("user", strings(&["q", "q"])), ("assistant", strings(&["a", "a"]))]);
    let texts = fields(vec![("user", strings(&["q", "q"])), ("assistant", answers)]);
    let find = |columns: Vec<(&str, ArrayRef)>, want: &str| {
        write_parquet(&path, columns);
        let rows = all(&Dataset::open(&path, &whole()).unwrap());
        let error = rows[1].as_ref().unwrap_err().to_string();
        assert!(error.contains("row 1 of") && error.contains(want), "{error}");
    };
    find(vec![("images", list(bytes, &[1, 1])), ("texts", list(whole_answers, &[1, 1]))], "image 0 has no bytes");
    find(vec![("texts", list(texts.clone(), &[1, 1]))], "text 0 has no `assistant`");
    let numbers: ArrayRef = Arc::new(arrow::array::Int32Array::from(vec![1, 2]));
    find(vec![("images", numbers.clone()), ("texts", list(texts, &[1, 1]))], "holds Int32 where a list is expected");

    write_parquet(&path, vec![("images", numbers)]);
    let error = Dataset::open(&path, &whole()).unwrap_err().to_string();
    assert!(error.contains("has no column of conversations, only images"), "{error}");

    shard(&path, 12, true);
    let file = fs::read(&path).unwrap();
    for length in [0, 10, file.len() / 2, file.len() - 1] {
        fs::write(&path, &file[..length]).unwrap();
        let error = Dataset::open(&path, &whole()).unwrap_err().to_string();
        assert!(error.contains("is not a readable Parquet file"), "{error}");
    }
    shard(&path, 0, true);
    assert!(Dataset::open(&path, &whole()).unwrap_err().to_string().contains("is empty"));
}

mod intake {
    use super::*;

    fn encoded(id: &str, tokens: usize) -> Encoded {
        Encoded {
            id: id.to_string(),
            input_ids: vec![1; tokens],
            answer_mask: vec![true; tokens],
            image_positions: Vec::new(),
            images: None,
            given: None,
        }
    }

    fn pass(broken: usize, strict: bool) -> (Vec<Result<Encoded>>, LeftOut) {
        pass_over(60, broken, strict)
    }

    /// Reads so many rows, of which the first `broken` have no answer. The number of tokens of a sample is its row number.
    fn pass_over(rows: usize, broken: usize, strict: bool) -> (Vec<Result<Encoded>>, LeftOut) {
        let folder = tempfile::tempdir().unwrap();
        let bad = r#"{"conversations": [{"from": "human", "value": "Hi"}]}"#;
        let lines: Vec<&str> = (0..rows).map(|row| if row < broken { bad } else { NONE }).collect();
        let path = write(folder.path(), "x.jsonl", &lines.join("\n"));
        let data = Dataset::open(&path, &DataOptions { strict, ..whole() }).unwrap();
        let bundle = crate::bundle::Bundle::open(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo/optimum/llama-with-past"),
        )
        .unwrap();
        let intake = Intake::new(&data, &bundle, 50);
        let indices: Vec<usize> = (0..rows).collect();
        let found = intake.encoded(&data, &indices, |sample| Ok(encoded(&sample.id, sample.index))).unwrap().collect();
        (found, intake.left_out())
    }

    #[test]
    fn unreadable_rows_and_long_samples_are_skipped_and_counted() {
        let (found, left_out) = pass(3, false);
        assert_eq!((found.len(), left_out.unreadable, left_out.too_long), (48, 3, 9));
        assert!(found.iter().all(Result::is_ok));
        assert_eq!(left_out.reasons.len(), 3);
        assert!(left_out.reasons[1].contains("row 1 of `x.jsonl`"), "{left_out:?}");
        assert!(left_out.summary().unwrap().starts_with("3 unreadable, 9 too long"));
    }

    #[test]
    fn one_bad_row_fails_a_strict_pass_and_over_five_percent_fail_any_pass() {
        let first = |found: Vec<Result<Encoded>>| found.into_iter().find_map(Result::err).unwrap().to_string();
        let strict = first(pass(1, true).0);
        assert!(strict.contains("row 0 of"), "{strict}");
        let many = first(pass(4, false).0);
        assert!(many.contains("x.jsonl`: more than 5% of 60 samples cannot be read"), "{many}");
        // A single row is never too many, of however few samples.
        let (found, left_out) = pass_over(4, 1, false);
        assert_eq!((found.len(), left_out.unreadable), (3, 1));
        assert!(found.iter().all(Result::is_ok));
        for (rows, broken) in [(4, 2), (1, 1)] {
            let many = first(pass_over(rows, broken, false).0);
            assert!(many.contains(&format!("more than 5% of {rows} samples cannot be read")), "{many}");
        }
    }
}

/// Equal rows are in the same part in every file. The two parts share no row and together have all rows.
#[test]
fn the_held_back_part_is_chosen_by_text() {
    let folder = tempfile::tempdir().unwrap();
    let row = |number: usize| {
        format!(
            "{{\"conversations\": [{{\"from\": \"human\", \"value\": \"Say {number}\"}}, {{\"from\": \"gpt\", \"value\": \"{number}\"}}, \
             {{\"from\": \"human\", \"value\": \"And?\"}}, {{\"from\": \"gpt\", \"value\": \"no\"}}]}}"
        )
    };
    let file = |name: &str, rows: &mut dyn Iterator<Item = usize>| {
        let path = folder.path().join(name);
        fs::write(&path, rows.map(row).collect::<Vec<_>>().join("\n")).unwrap();
        path
    };
    let (first, second) = (file("first.jsonl", &mut (0..400)), file("second.jsonl", &mut (200..600).rev()));
    let texts = |path: &Path, part: DataPart| -> Vec<String> {
        let data = Dataset::open(path, &DataOptions { part, ..separate() }).unwrap();
        let samples = all(&data).into_iter().map(Result::unwrap);
        samples.map(|sample| format!("{:?}", sample.turns[0])).filter(|text| text.contains("Say")).collect()
    };
    let (train, held_back) = (DataPart::Train(0.2), DataPart::HeldBack(0.2));
    let (rest, apart) = (texts(&first, train), texts(&first, held_back));
    assert_eq!(rest.len() + apart.len(), 400);
    // Of 400 rows, 80 are expected at 0.2, with a standard deviation of 8.
    assert!((48..=112).contains(&apart.len()), "{}", apart.len());
    assert!(texts(&second, train).iter().all(|text| !apart.contains(text)));
    assert!(texts(&second, held_back).iter().all(|text| !rest.contains(text)));
    assert!(texts(&second, held_back).iter().any(|text| apart.contains(text)));
    let all_of_it = Dataset::open(&first, &separate()).unwrap();
    let digests = [DataPart::All, train, held_back]
        .map(|part| Dataset::open(&first, &DataOptions { part, ..separate() }).unwrap().digest().unwrap());
    assert_eq!(all_of_it.digest().unwrap(), digests[0]);
    assert!(digests[0] != digests[1] && digests[1] != digests[2]);
    // Both turns of a row are in the same part.
    let turns = |part| Dataset::open(&first, &DataOptions { part, ..separate() }).unwrap().len();
    assert_eq!((turns(train), turns(held_back)), (2 * rest.len(), 2 * apart.len()));
    let none = Dataset::open(&first, &DataOptions { part: DataPart::HeldBack(1e-9), ..whole() }).unwrap_err();
    assert!(none.to_string().contains("has no row that is held back"), "{none}");
}
