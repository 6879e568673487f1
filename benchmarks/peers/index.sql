-- The same rules in PostgreSQL. A row lock on each dependency keeps it from being removed meanwhile.
CREATE TABLE package (name text PRIMARY KEY);
CREATE TABLE dependency (package text, dependency text, PRIMARY KEY (package, dependency));
CREATE INDEX dependent ON dependency (dependency);

CREATE FUNCTION pkg_query(wanted text) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN EXISTS (SELECT FROM package WHERE name = wanted);
END $$;

CREATE FUNCTION pkg_index(new text, deps text[]) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE found_rows integer;
BEGIN
    IF cardinality(deps) > 0 THEN
        PERFORM 1 FROM package WHERE name = ANY (deps) ORDER BY name FOR KEY SHARE;
        GET DIAGNOSTICS found_rows = ROW_COUNT;
        IF found_rows < (SELECT count(DISTINCT d) FROM unnest(deps) d) THEN
            RETURN false;
        END IF;
    END IF;
    INSERT INTO package VALUES (new) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        DELETE FROM dependency WHERE package = new AND dependency <> ALL (deps);
    END IF;
    IF cardinality(deps) > 0 THEN
        INSERT INTO dependency SELECT DISTINCT new, d FROM unnest(deps) d ON CONFLICT DO NOTHING;
    END IF;
    RETURN true;
END $$;

CREATE FUNCTION pkg_remove(old text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM package WHERE name = old FOR UPDATE;
    IF NOT FOUND THEN
        RETURN true;
    END IF;
    IF EXISTS (SELECT FROM dependency WHERE dependency = old AND package <> old) THEN
        RETURN false;
    END IF;
    DELETE FROM dependency WHERE package = old;
    DELETE FROM package WHERE name = old;
    RETURN true;
END $$;
