"""What every format shares: strict JSON, configs, headers, index files, and the catalog made of them."""
