//! `generate` on a single question and on every question of a data set.

use std::path::{Path, PathBuf};

use super::cli::{interlace, stderr, stdout};

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

#[test]
fn generate_answers_one_question_or_a_data_set_and_compares_models() {
    let picture = std::fs::read_dir(fixture("processor/pictures"))
        .expect("pictures")
        .map(|entry| entry.expect("entry").path())
        .find(|path| path.extension().is_some_and(|extension| extension == "png"))
        .expect("a picture");
    let (model, picture) = (fixture("model"), picture.display().to_string());
    let model = model.to_str().expect("path");
    let ask = |more: &[&str]| {
        let common =
            ["--json", "generate", model, "--image", &picture, "--prompt", "What is this?", "--max-tokens", "8"];
        let output = interlace(Path::new("."), &[&common[..], more].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let out = stdout(&output);
        let found: serde_json::Value = serde_json::from_str(&out).expect("JSON");
        found["answers"].as_array().expect("answers").clone()
    };
    let both = ask(&["--compare", model]);
    assert_eq!(both.len(), 2);
    assert_eq!(both[0]["answer"], both[1]["answer"]);
    assert!(both[0]["tokens"].as_u64() > Some(0) && both[0]["first_token_s"].as_f64() > Some(0.0));
    let drawn = |seed: &str| ask(&["--temperature", "3", "--top-p", "0.9", "--seed", seed])[0]["answer"].clone();
    assert_eq!(drawn("1"), drawn("1"));
    assert!(["2", "3", "4", "5"].iter().any(|seed| drawn(seed) != both[0]["answer"]));

    let folder = tempfile::tempdir().expect("folder");
    let output = folder.path().join("answers.jsonl");
    let data = fixture("data/finetune-small.parquet");
    let (data, output) = (data.to_str().expect("path"), output.to_str().expect("path"));
    let done =
        interlace(Path::new("."), &["generate", model, "--data", data, "--turns", "separate", "--output", output]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    let text = std::fs::read_to_string(output).expect("answers");
    let answers: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(answers.len(), 32);
    assert!(answers.iter().all(|line| line["answer"].as_str().is_some_and(|answer| !answer.is_empty())));

    for (wrong, want) in [
        (&["--image", "missing.png", "--prompt", "x"][..], "missing.png"),
        (&["--temperature=-1", "--prompt", "x"][..], "temperature: is -1, expected a number of 0 or more"),
        (&[][..], "--prompt <TEXT>"),
    ] {
        let output = interlace(Path::new("."), &[&["generate", model][..], wrong].concat());
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {message}");
        assert!(message.contains(want), "{wrong:?}: {message}");
    }
}
