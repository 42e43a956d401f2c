//! Compares images read one by one with the rows that the `parquet` crate's writer wrote, with varying writer options.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryBuilder, ListBuilder, RecordBatch, StringBuilder, StructArray, StructBuilder,
};
use arrow::datatypes::{DataType, Field, Fields};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::ByteColumn;
use crate::data::columns::Cells;

/// Images of each row; `None` when the list is null.
type Rows = Vec<Option<Cells>>;

/// Rows of zero to three images. Some images are null, some are equal, a few are long.
fn rows(random: &mut ChaCha8Rng, count: usize, most: usize) -> Rows {
    let known: Vec<Arc<[u8]>> = (0..10u8).map(|n| vec![n; usize::from(n) * 9].into()).collect();
    let picture = |random: &mut ChaCha8Rng| -> Option<Arc<[u8]>> {
        match random.random_range(0..10) {
            0 => None,
            1..5 => known.choose(random).cloned(),
            5 => Some((0..random.random_range(0..5000)).map(|_| random.random()).collect()),
            _ => Some((0..random.random_range(0..60)).map(|_| random.random()).collect()),
        }
    };
    let row = |random: &mut ChaCha8Rng| {
        let count = if most == 1 { 1 } else { random.random_range(0..=most) };
        random.random_bool(0.9).then(|| (0..count).map(|_| picture(random)).collect())
    };
    (0..count).map(|_| row(random)).collect()
}

fn fields() -> Fields {
    Fields::from(vec![Field::new("bytes", DataType::Binary, true), Field::new("path", DataType::Utf8, true)])
}

fn push(cells: &mut StructBuilder, picture: Option<&[u8]>) {
    cells.field_builder::<BinaryBuilder>(0).unwrap().append_option(picture);
    cells.field_builder::<StringBuilder>(1).unwrap().append_null();
    // Readers do not distinguish a null struct from a struct without bytes.
    cells.append(picture.is_some());
}

/// `images: list<struct{bytes, path}>`.
fn nested(rows: &Rows) -> ArrayRef {
    let mut list = ListBuilder::new(StructBuilder::from_fields(fields(), 0));
    for row in rows {
        row.iter().flatten().for_each(|picture| push(list.values(), picture.as_deref()));
        list.append(row.is_some());
    }
    Arc::new(list.finish())
}

/// `images: list<binary>`.
fn plain(rows: &Rows) -> ArrayRef {
    let mut list = ListBuilder::new(BinaryBuilder::new());
    for row in rows {
        row.iter().flatten().for_each(|picture| list.values().append_option(picture.as_deref()));
        list.append(row.is_some());
    }
    Arc::new(list.finish())
}

/// `image: struct{bytes, path}`.
fn single(rows: &Rows) -> ArrayRef {
    let mut cells = StructBuilder::from_fields(fields(), 0);
    rows.iter().for_each(|row| push(&mut cells, row.as_ref().and_then(|row| row[0].as_deref())));
    Arc::new(cells.finish())
}

fn write(path: &Path, column: ArrayRef, properties: WriterProperties) {
    let batch = RecordBatch::try_from_iter([("images", column)]).unwrap();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    // Written in pieces, because a page can end only at the end of a piece.
    for begin in (0..batch.num_rows()).step_by(7) {
        writer.write(&batch.slice(begin, 7.min(batch.num_rows() - begin))).unwrap();
    }
    writer.close().unwrap();
}

fn open(path: &Path, with_index: bool) -> (Vec<usize>, Vec<ByteColumn>) {
    let file = Arc::new(File::open(path).unwrap());
    let options = ArrowReaderOptions::new().with_page_index(with_index);
    let metadata = ArrowReaderMetadata::load(&*file, options).unwrap();
    let groups = metadata.metadata().row_groups();
    let columns = (0..groups.len()).map(|group| ByteColumn::open(&file, metadata.metadata(), group, 0).unwrap());
    (groups.iter().map(|group| group.num_rows() as usize).collect(), columns.collect())
}

/// Reads a random selection of rows and compares them with `want`.
fn compare(path: &Path, with_index: bool, random: &mut ChaCha8Rng, want: &[Cells], case: &str) {
    let share = *[0.02, 0.3, 1.0].choose(random).unwrap();
    let (rows, columns) = open(path, with_index);
    let mut start = 0;
    for (count, mut column) in rows.into_iter().zip(columns) {
        for row in (0..count).filter(|_| random.random_bool(share)).collect::<Vec<_>>() {
            assert_eq!(column.cells(row).as_ref(), Ok(&want[start + row]), "{case}, row {row} of {count}");
        }
        start += count;
    }
    assert_eq!(start, want.len(), "{case}");
}

#[test]
fn pictures_read_one_by_one_equal_the_written_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let codecs = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
    ];
    type Shape = (&'static str, usize, fn(&Rows) -> ArrayRef);
    let shapes: [Shape; 3] = [("nested", 3, nested), ("plain", 3, plain), ("single", 1, single)];
    let mut random = ChaCha8Rng::seed_from_u64(7);
    for (name, most, column) in shapes {
        for codec in codecs {
            for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
                for page in [1, 500, 1 << 20] {
                    for dictionary in [0, 3000, 1 << 20] {
                        let written = rows(&mut random, 120, most);
                        let properties = WriterProperties::builder()
                            .set_compression(codec)
                            .set_writer_version(version)
                            .set_dictionary_enabled(dictionary > 0)
                            .set_dictionary_page_size_limit(dictionary)
                            .set_data_page_size_limit(page)
                            .set_write_batch_size(3)
                            .set_encoding(parquet::basic::Encoding::PLAIN)
                            .set_max_row_group_size(70)
                            .build();
                        write(&path, column(&written), properties);
                        let none = || if most == 1 { vec![None] } else { Vec::new() };
                        let want: Vec<Cells> = written.into_iter().map(|row| row.unwrap_or_else(none)).collect();
                        for with_index in [false, true] {
                            let case =
                                format!("{name}, {codec}, {version:?}, pages of {page}, dictionary {dictionary}");
                            compare(&path, with_index, &mut random, &want, &format!("{case}, index {with_index}"));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_dictionary_may_exceed_the_size_held_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let mut random = ChaCha8Rng::seed_from_u64(8);
    let pictures: Vec<Arc<[u8]>> = (0..6).map(|_| (0..1 << 20).map(|_| random.random::<u8>()).collect()).collect();
    let written: Rows = (0..24).map(|row| Some(vec![Some(pictures[row % 6].clone())])).collect();
    for codec in [Compression::SNAPPY, Compression::UNCOMPRESSED] {
        let properties = WriterProperties::builder().set_compression(codec).set_dictionary_page_size_limit(1 << 30);
        write(&path, nested(&written), properties.build());
        assert!(path.metadata().unwrap().len() < 7 << 20);
        let (_, mut columns) = open(&path, true);
        for (row, want) in written.iter().enumerate() {
            assert_eq!(columns[0].cells(row).as_ref().ok(), want.as_ref(), "row {row}");
        }
    }
}

/// Version 1 pages that end inside a row, as Arrow's C++ library writes them (`scripts/fixture/pages.py`).
#[test]
fn a_row_may_continue_on_the_next_page() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/processor/pages.parquet");
    let file = File::open(&path).unwrap();
    let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(file, 1 << 10).unwrap();
    let batches: Vec<RecordBatch> = reader.collect::<Result<_, _>>().unwrap();
    let (rows, mut columns) = open(&path, false);
    assert_eq!((batches.len(), rows.len()), (1, 1));
    let list = batches[0].column(0).as_list::<i32>();
    for row in 0..rows[0] {
        let cells = list.value(row);
        let cells: &StructArray = cells.as_struct();
        let bytes = cells.column_by_name("bytes").unwrap().as_binary::<i32>();
        let want: Cells = (0..bytes.len()).map(|cell| bytes.is_valid(cell).then(|| bytes.value(cell).into())).collect();
        assert_eq!(columns[0].cells(row), Ok(want), "row {row}");
    }
}

#[test]
fn truncated_or_changed_files_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let mut written = rows(&mut random, 60, 3);
    // Images are shortened, so that most bytes are headers, levels and lengths.
    for picture in written.iter_mut().flatten().flatten().flatten() {
        *picture = picture[..picture.len().min(2)].into();
    }
    let mut outcomes: HashMap<bool, usize> = HashMap::new();
    for codec in [Compression::UNCOMPRESSED, Compression::SNAPPY] {
        let properties = WriterProperties::builder().set_compression(codec).set_data_page_size_limit(900);
        write(&path, nested(&written), properties.set_write_batch_size(3).build());
        let sound = std::fs::read(&path).unwrap();
        let (rows, _) = open(&path, false);
        for _ in 0..400 {
            let mut bytes = sound.clone();
            // The footer is not damaged; another reader handles it.
            for _ in 0..random.random_range(1..4) {
                let place = random.random_range(4..sound.len() - 900);
                bytes[place] = random.random();
            }
            let file = Arc::new(tempfile::tempfile().unwrap());
            std::os::unix::fs::FileExt::write_all_at(&*file, &bytes, 0).unwrap();
            let Ok(metadata) = ArrowReaderMetadata::load(&*file, ArrowReaderOptions::new()) else { continue };
            let Some(mut column) = ByteColumn::open(&file, metadata.metadata(), 0, 0) else { continue };
            let found: Result<Vec<Cells>, String> = (0..rows[0]).map(|row| column.cells(row)).collect();
            *outcomes.entry(found.is_ok()).or_default() += 1;
            if let Err(problem) = found {
                assert_eq!(column.cells(rows[0]), Err(problem), "the error of a column stays");
            }
        }
    }
    assert!(outcomes.get(&false).is_some_and(|count| *count > 50), "{outcomes:?}");
}
